"""Tests of the ready-made tasks and of finding a task by its name."""
