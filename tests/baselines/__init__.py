"""Baselines against dense second implementations."""
