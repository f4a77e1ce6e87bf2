"""Thin adapters, one a library: run as `python -m comparison.peers.NAME FOLDER METHOD OUT` in its environment."""
