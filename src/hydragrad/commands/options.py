"""Arguments and options that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hydragrad.amounts import bytes_of
from hydragrad.errors import UnsupportedError
from hydragrad.files import stage

TASK = (
    "What was trained: a ready task (digits, digits-flipped), module:object, or path/to/file.py:object, where the "
    "object is a hydragrad.Task or a function without arguments that returns one."
)
TaskName = Annotated[str, typer.Argument(help=TASK, show_default=False)]
TaskOption = Annotated[str, typer.Option("--task", "-t", help=TASK, show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="The folder of the recorded run.", show_default=False)]
Jobs = Annotated[int, typer.Option("--jobs", "-j", help="Retrainings side by side; -1: all cores.")]
Resume = Annotated[
    Path | None, typer.Option("--resume", help="Folder that keeps every finished retraining.", show_default=False)
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


def known_queries(queries: Sequence[int] | None, count: int) -> None:
    """Refuse test examples that there are not as wrong usage, before anything long."""
    for query in queries or []:
        if not 0 <= query < count:
            raise typer.BadParameter(f"{query} is no test example: 0 to {count - 1}", param_hint="--query")


def file_to_write(path: Path | None, option: str) -> None:
    """Before anything long: a folder is wrong usage, and a place that cannot be written raises StoreError."""
    if path is None:
        return
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; name a file", param_hint=option)
    stage(path, b"").unlink()


def amount(text: str | None, option: str) -> int | None:
    """Bytes of "2GB", "512 MiB" or a number of MiB; anything else is wrong usage."""
    if text is None:
        return None
    try:
        return bytes_of(f"{text} MiB" if text.strip().isdigit() else text, option)
    except UnsupportedError as error:
        raise typer.BadParameter(str(error), param_hint=option) from error
