"""Arguments and options that several commands share."""

from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hydragrad.amounts import bytes_of
from hydragrad.errors import UnsupportedError
from hydragrad.files import stage

TASK = (
    "What is trained, the same for all commands on one run: a ready task (digits, digits-flipped, fashion), "
    "module:object, or path/to/file.py:object, where the object is a "
    "hydragrad.Task or a function without arguments that returns one."
)
TaskName = Annotated[str, typer.Argument(help=TASK, show_default=False)]
TaskOption = Annotated[str, typer.Option("--task", "-t", help=TASK, show_default=False)]
RunFolder = Annotated[Path, typer.Argument(help="The folder of the recorded run.", show_default=False)]
Jobs = Annotated[int, typer.Option("--jobs", "-j", help="Retrainings side by side; -1: all cores.")]


def named_path(given: str) -> Path:
    """``Path("")`` would be the current folder."""
    if not given.strip():
        raise typer.BadParameter('the path is empty; the current folder is "."')
    return Path(given)


Resume = Annotated[
    Path | None,
    typer.Option(
        "--resume",
        parser=named_path,
        metavar="PATH",
        help="Folder that keeps every finished retraining.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]


class Method(StrEnum):
    """The methods by their names on the command line."""

    exact = "exact"
    gauss_newton = "gauss-newton"
    hessian_free = "hessian-free"


MethodOption = Annotated[
    Method,
    typer.Option("--method", "-m", help="exact: the true derivative of the run; the others approximate its curvature."),
]
ScoresFile = Annotated[
    Path | None, typer.Option("--out", "-o", help="File for the scores (safetensors).", show_default=False)
]
ShownQueries = Annotated[
    list[int] | None,
    typer.Option("--query", "-q", help="Test example to show; repeatable. Without it: the whole test set."),
]
Memory = Annotated[
    str | None,
    typer.Option(
        help="Budget above training's: 2GB, 512MiB; a number alone is MiB. Default: half of what is free.",
        show_default=False,
    ),
]
Disk = Annotated[
    str | None,
    typer.Option(help="Budget for states in a temporary folder, which spare replays: 10GB.", show_default=False),
]
Replays = Annotated[
    float | None, typer.Option(min=1.0, help="How many times the run may be replayed.", show_default=False)
]
Blocks = Annotated[
    Path | None,
    typer.Option(help="Folder that keeps finished blocks: the same command goes on after a kill.", show_default=False),
]
Smoothing = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="For questions about many examples at once: the mean over the run and others that lack a part of its "
        "data, so many in all.",
        show_default=False,
    ),
]
Fraction = Annotated[
    float | None,
    typer.Option(
        min=0.0, max=0.99, help="With --smoothing: the part of the data that each run lacks.", show_default="about 0.1"
    ),
]


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
