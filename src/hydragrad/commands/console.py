"""Where the commands write, and how refusals are shown: the message alone, exit code 1."""

from typing import Any, final

import typer
from rich.console import Console
from typer.core import TyperGroup

from hydragrad.errors import HydragradError

console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)


def interactive() -> bool:
    """Whether someone watches the bars (they go to stderr); a log keeps the lines without them."""
    return _errors.is_terminal


def say(*lines: str) -> None:
    """Plain lines: no markup is read into paths and messages, and nothing is cut to the width."""
    for line in lines:
        console.print(line, markup=False, soft_wrap=True)


@final
class Refusing(TyperGroup):
    """A group of commands that ends with exit code 1 and a message where the library refuses."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HydragradError as error:
            _errors.print(f"{type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error
