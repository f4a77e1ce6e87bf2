"""The command line: demo, train, attribute, verify (needs typer and rich)."""
