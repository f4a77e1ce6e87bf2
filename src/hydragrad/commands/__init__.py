"""The command line: demo, train, attribute, validate, verify (needs typer and rich)."""
