"""Tests of the sweeps, through the public names, against the oracles."""
