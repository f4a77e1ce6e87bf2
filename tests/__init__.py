"""The tests; shared helpers are imported as `from tests.<helper> import ...`."""
