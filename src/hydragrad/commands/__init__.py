"""The command line: demo, train, attribute, validate, mislabels, report, verify (needs typer and rich)."""
