"""Measured, never tested: cost as a ratio to plain training, and peak memory. `make bench` runs all of it."""
