"""Tests of what people look at: measures and pictures."""
