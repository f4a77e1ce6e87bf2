"""The command that looks for wrong labels."""

import csv
import io
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hydragrad.commands.console import console, interactive, say
from hydragrad.commands.options import Jobs, Resume, RunFolder, TaskOption, file_to_write
from hydragrad.files import write_atomically
from hydragrad.report.measures import precision_recall
from hydragrad.report.tables import plain_table
from hydragrad.signals.ensembles import REPLAYS
from hydragrad.suspecting import mislabels as find_mislabels
from hydragrad.suspects import Suspects
from hydragrad.tasks.naming import resolve_task
from hydragrad.tasks.task import Task


class Signal(StrEnum):
    """The signals by their names on the command line."""

    el2n = "el2n"
    margin = "margin"
    doubt = "doubt"
    late = "late"
    combined = "combined"
    ensemble = "ensemble"
    loss = "loss"
    self = "self"
    harm = "harm"
    of_class = "class"
    cluster = "cluster"


def mislabels(
    run: RunFolder,
    task: TaskOption,
    signal: Annotated[
        Signal | None,
        typer.Option(
            "--signal",
            "-s",
            help="What makes an example suspicious. harm, class and cluster ask its scores for the test set, which "
            "takes as long as attribute; ensemble trains again. Default: el2n, or loss where there are no labels.",
            show_default=False,
        ),
    ] = None,
    replays: Annotated[int, typer.Option(help="Trainings on halves of the data for ensemble; even.")] = REPLAYS,
    jobs: Jobs = 1,
    resume: Resume = None,
    top: Annotated[int, typer.Option(min=1, help="How many suspects to show.")] = 20,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File for all examples (CSV).", show_default=False)
    ] = None,
) -> None:
    """Rank the training examples by how suspicious their labels are, and suggest labels that fit better.

        hydragrad train digits-flipped --out runs/flipped
        hydragrad mislabels runs/flipped --task digits-flipped --top 20
        hydragrad mislabels runs/flipped --task digits-flipped --out suspects.csv

    Read off the states that the recorded run stored; --signal ensemble alone trains again.
    """
    if out is not None and out.suffix.lower() not in ("", ".csv", ".txt"):
        raise typer.BadParameter(f"{out} is written as CSV: name a .csv file", param_hint="--out")
    file_to_write(out, "--out")
    chosen = resolve_task(task)
    bound = chosen.load(run)
    name = None if signal is None else signal.value
    clean = chosen.test if name in ("harm", "class", "cluster") else None
    retraining = {"replays": replays, "jobs": jobs, "resume": resume}
    found = find_mislabels(bound, signal=name, clean=clean, progress=interactive(), **retraining)
    say(str(found).splitlines()[0])
    if found.note:
        say(found.note)
    _show(found, chosen, top)
    if found.suggested is not None:
        say(f"for {int(found.flagged.sum())} of {len(found)} another label fits better, averaged along the run")
    if chosen.flipped_ids is not None and len(chosen.flipped_ids):
        count = len(chosen.flipped_ids)
        said = precision_recall(found.score, chosen.flipped_ids, count)
        say(f"known wrong labels: {count}; among the first {count} suspects {said.recall:.1%} of them")
    if out is not None:
        write_atomically(out, _csv(found).encode())
        say(f"saved: {out}")


def _show(found: Suspects, task: Task, top: int) -> None:
    headers = ["example", "score"]
    if found.suggested is not None:
        headers += ["label", "fits better", "confidence"]
    if task.true_labels is not None:
        headers.append("true label")
    rows = []
    for row in found.top(top):
        cells = [str(row.id), f"{row.score:.4g}"]
        if row.confidence is not None:
            better = "" if row.suggested == row.label else str(row.suggested)
            cells += [str(row.label), better, f"{row.confidence:.2f}"]
        if task.true_labels is not None:
            cells.append(str(int(task.true_labels[row.id])))
        rows.append(cells)
    console.print(plain_table(headers, rows))


def _csv(found: Suspects) -> str:
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = list(found.signals)
    writer.writerow(["id", "score", "label", "suggested", "confidence", *(f"signal_{name}" for name in names)])
    for row in found.top(len(found)):
        cells = ["" if cell is None else cell for cell in (row.label, row.suggested, row.confidence)]
        writer.writerow([row.id, row.score, *cells, *(float(found.signals[name][row.id]) for name in names)])
    return file.getvalue()
