"""The command that puts saved scores to the proof."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from hydragrad.attribution import Attribution
from hydragrad.commands.console import interactive, say
from hydragrad.commands.options import Jobs, Resume, RunFolder, Seed, TaskOption, file_to_write
from hydragrad.tasks.naming import resolve_task
from hydragrad.validating import validate as validate_scores


class Metric(StrEnum):
    """The metrics by their names on the command line."""

    loo = "loo"
    subset = "subset"
    remove = "remove"
    relabel = "relabel"


def validate(
    run: RunFolder,
    task: TaskOption,
    scores: Annotated[
        Path, typer.Option("--scores", "-s", help="Scores saved by attribute --out or the demo.", show_default=False)
    ],
    metric: Annotated[
        Metric,
        typer.Option(
            "--metric",
            "-m",
            help="loo: examples one by one; subset: random tenths (LDS); remove: the most helpful and harmful, "
            "step by step; relabel: suspects with their likely true label.",
        ),
    ] = Metric.loo,
    n: Annotated[
        int | None, typer.Option("-n", min=1, help="Examples, subsets, random draws or suspects. Default: by metric.")
    ] = None,
    fraction: Annotated[float, typer.Option(help="Part of the examples in a subset; from 1 on: how many.")] = 0.1,
    seed: Seed = 0,
    jobs: Jobs = 1,
    resume: Resume = None,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="File for the result (safetensors).", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="File for a picture (PNG).", show_default=False)] = None,
) -> None:
    """Really retrain without some examples, and say whether the scores predicted what happened.

        hydragrad validate runs/digits --task digits --scores scores.safetensors
        hydragrad validate runs/digits --task digits --scores scores.safetensors -m remove --jobs -1 --plot curves.png

    Scores are those of the whole test set of the task, as attribute --out saves them. With --resume a stopped
    validation goes on where it was, and scores of another method use the same retrainings.
    """
    file_to_write(out, "--out")
    file_to_write(plot, "--plot")
    chosen = resolve_task(task)
    given = Attribution.load(scores)
    found = validate_scores(
        chosen.load(run),
        given,
        chosen.test,
        metric=metric.value,
        n=n,
        fraction=fraction,
        accuracy=chosen.accuracy,
        seed=seed,
        jobs=jobs,
        resume=resume,
        on_plan=lambda plan: say(f"plan: {plan}"),
        progress=interactive(),
    )
    say("", str(found))
    if advice := _advice(metric, found.correlation.mean, given):
        say(f"advice: {advice}")
    if out is not None:
        say(f"saved: {found.save(out)}")
    if plot is not None:
        say(f"the picture: {found.plot(plot)}")


_ENOUGH = 0.8
"""A correlation from which no other scores are worth their time."""


def _advice(metric: Metric, correlation: float, scores: Attribution) -> str:
    """Which scores are meant for this question, where these are not and it shows."""
    smoothed = scores.diagnostics.smoothing is not None
    if correlation >= _ENOUGH or metric not in (Metric.subset, Metric.loo) or smoothed == (metric == Metric.subset):
        return ""
    if smoothed:
        return "these scores are smoothed, for many examples at once; for single ones attribute without --smoothing"
    return "these scores are for single examples; for many at once attribute with --smoothing 8"
