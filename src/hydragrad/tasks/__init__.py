"""Ready-made training tasks on real data, and the means to write one's own."""
