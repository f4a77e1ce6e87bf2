"""The command line: demo, train, attribute, validate, mislabels, verify (needs typer and rich)."""
