"""What really happens with other weights or other data: the recorded steps taken again, alone or by many workers."""
