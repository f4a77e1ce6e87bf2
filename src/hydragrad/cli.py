"""The entry of the command line, which explains itself when its packages are missing."""

import sys

NEEDED = ("typer", "rich", "click")


def main() -> None:
    """Run ``hydragrad``; without typer or rich, name the extra that brings them."""
    try:
        from hydragrad.commands.app import app
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in NEEDED:
            raise
        sys.exit(f"hydragrad's command line needs {missing}, which is not installed: pip install 'hydragrad[cli]'")
    app(prog_name="hydragrad")
