"""Tests of retraining by replay, against loops written out."""
