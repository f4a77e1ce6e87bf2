"""The command that writes the page."""

from pathlib import Path
from typing import Annotated

import typer

from hydragrad.attribution import Attribution
from hydragrad.commands.console import interactive, say
from hydragrad.commands.options import RunFolder, TaskOption, file_to_write, known_queries
from hydragrad.reporting import write_report
from hydragrad.suspecting import mislabels
from hydragrad.tasks.naming import resolve_task
from hydragrad.validation import Validation


def report(
    run: RunFolder,
    task: TaskOption,
    scores: Annotated[
        Path, typer.Option("--scores", "-s", help="Scores saved by attribute --out or the demo.", show_default=False)
    ],
    validation: Annotated[
        list[Path] | None,
        typer.Option("--validation", "-v", help="Result of validate --out; repeatable.", show_default=False),
    ] = None,
    query: Annotated[
        list[int] | None,
        typer.Option("--query", "-q", help="Test example to show; repeatable. Without it: the worst predicted."),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=100, help="How many training examples of each kind to show.")] = 8,
    suspects: Annotated[bool, typer.Option(help="Look for suspicious labels, as mislabels does.")] = True,
    out: Annotated[Path, typer.Option("--out", "-o", help="File for the page (HTML).")] = Path("report.html"),
) -> None:
    """Write one HTML page that shows it all: verdict, queries, evidence, suspects, proof. It needs no network.

        hydragrad report runs/digits --task digits --scores scores.safetensors
        hydragrad report runs/digits --task digits --scores scores.safetensors --query 3 --validation proof.safetensors

    Scores are those of the whole test set of the task, as attribute --out saves them.
    """
    file_to_write(out, "--out")
    chosen = resolve_task(task)
    known_queries(query, len(chosen.test))
    given = Attribution.load(scores)
    proofs = [Validation.load(path) for path in validation or []]
    bound = chosen.load(run)
    found = mislabels(bound, progress=interactive()) if suspects else None
    path = write_report(
        out,
        bound,
        given,
        chosen.test,
        query=query or None,
        top=top,
        validation=proofs,
        suspects=found,
        show=chosen.show,
        names=chosen.names,
        true_labels=chosen.true_labels,
        title=f"Why? {chosen.name}",
    )
    say(f"{given.diagnostics.verdict}; the page: {path} ({path.stat().st_size / 1e3:.0f} kB)")
