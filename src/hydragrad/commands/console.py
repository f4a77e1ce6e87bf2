"""Where the commands write, and how refusals are shown: the message alone, exit code 1."""

import signal
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


STOPPED = "stopped: files that were written are whole, and a command with --resume goes on where it was"


@final
class Refusing(TyperGroup):
    """A group of commands that ends with a message and exit code 1 where the library refuses, 130 when interrupted."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except HydragradError as error:
            _errors.print(f"{type(error).__name__}: {error}", style="red", markup=False, soft_wrap=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            _errors.print(STOPPED, soft_wrap=True)
            raise typer.Exit(128 + signal.SIGINT) from error
