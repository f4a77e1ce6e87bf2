"""What happened in training: recorded as it happens, kept on disk, replayed exactly."""
