"""What a recorded run and an attribution say of themselves, as rows of tables."""

import time
from collections.abc import Sequence
from typing import Any

import torch

from hydragrad.checks import DOUBTFUL, RELIABLE
from hydragrad.diagnostics import Diagnostics
from hydragrad.report.charts import Chart, ladder, trace
from hydragrad.report.samples import number
from hydragrad.run import Run
from hydragrad.trajectory.format import MANIFEST

_HYPER = ("lr", "momentum", "betas", "weight_decay", "nesterov", "amsgrad")


def facts_of(run: Run) -> list[tuple[str, str]]:
    """Model, optimizer, steps, data, when and with what: (name, words)."""
    manifest, steps, trajectory = run.trajectory.manifest, run.steps, run.trajectory
    count = sum(torch.Size(spec["shape"]).numel() for spec in manifest.params.values())
    trained = sum(torch.Size(s["shape"]).numel() for s in manifest.params.values() if s["requires_grad"])
    of_them = "" if trained == count else f", {trained:,} of them trained"
    dtypes = sorted({str(spec["dtype"]) for spec in manifest.params.values()})
    epochs = 1 + max((max(record.epochs or (record.epoch,)) for record in steps), default=-1)
    sizes = sorted({len(batch) for record in steps for batch in record.batches})
    batches = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}" if sizes else "none"
    recorded = time.strftime("%Y-%m-%d %H:%M", time.localtime((trajectory.folder / MANIFEST).stat().st_mtime))
    return [
        ("model", f"{type(run.problem.model).__name__}, {count:,} parameters{of_them}, {', '.join(dtypes)}"),
        ("optimizer", _optimizer(run)),
        ("steps", f"{len(steps):,} in {epochs} pass(es) over the data, batches of {batches}"),
        ("training data", f"{run.num_examples:,} examples ({type(run.problem.data).__name__})"),
        ("loss of a batch", run.problem.reduction.name or "a reduction of the user's own"),
        ("recorded", f"{recorded} (the date of its files), in {trajectory.folder}"),
        ("ended", "as it should" if trajectory.complete else f"incomplete: {trajectory.reason}"),
        ("torch", f"{manifest.torch} when recorded, {torch.__version__} when this page was made"),
        ("device", manifest.device),
    ]


def _optimizer(run: Run) -> str:
    about = run.trajectory.manifest.optimizer
    if not run.steps:
        return str(about["class"])
    groups = run.steps[0].groups
    first, last = groups[0], run.steps[-1].groups[0]
    told = []
    for name in _HYPER:
        began, ended = first.get(name), last.get(name)
        if began or ended:
            told.append(f"{name} {_value(began)}" + ("" if began == ended else f" to {_value(ended)}"))
    of_groups = f" ({len(groups)} groups; the first:)" if len(groups) > 1 else ""
    return f"{about['class']}{of_groups} {', '.join(told)}".rstrip()


def _value(value: Any) -> str:
    if isinstance(value, tuple | list):
        return "(" + ", ".join(map(_value, value)) + ")"
    return f"{value:g}" if isinstance(value, float) else str(value)


def checks_of(about: Diagnostics) -> list[tuple[str, str, str]]:
    """Cost and checks of an attribution: (name, value, meaning)."""
    drift = "0" if about.drift == 0 else number(about.drift)
    rows = [
        ("method", about.method, "how the curvature of the loss was taken"),
        ("time", f"{about.seconds:.1f} s", f"of it {about.check_seconds:.1f} s for the check against retraining"),
        ("cost", f"{about.ratio:.1f} ×", "in plain replays of the training run, the check not counted"),
        ("replay drift", drift, "largest relative difference of the replay from the record; 0: bit for bit"),
        ("adjoint growth", f"{number(about.growth)} ×", "how much the run amplifies small changes; large: chaotic"),
    ]
    if about.ladder:
        error, correlation = about.finite_difference_error, about.ladder[-1].correlation
        rows.append(
            ("error at the top", f"{error:.2f}", f"really removing {len(about.examples)} examples, against the scores")
        )
        if correlation == correlation:
            rows.append(
                ("correlation at the top", f"{correlation:.2f}", "of predicted and real changes over the queries")
            )
    if about.range is not None:
        rows.append(("good for", f"{about.range.removals:.2g}", str(about.range)))
    if (found := about.smoothing) is not None:
        rows.append(
            ("smoothed", f"{found.runs} runs", f"each without {found.fraction:g} of the examples; the mean of them")
        )
        if found.subsets:
            meaning = f"of predicted and real changes when {found.subsets} other subsets are removed"
            rows.append(("correlation there", f"{found.correlation:.2f}", meaning))
    if about.derivative_error is not None:
        rows.append(("derivative error", number(about.derivative_error), "of torch's derivatives, in float64"))
    if about.measurement_error is not None:
        rows.append(("slope error", number(about.measurement_error), "of torch's slopes of the queries' measurement"))
    if about.gradient_gap is not None:
        rows.append(("gradient gap", number(about.gradient_gap), "between the differentiated and the trained loss"))
    if about.nondeterminism:
        rows.append(("unrepeatable", "yes", about.nondeterminism))
    return rows


def charts_of(about: Diagnostics) -> Sequence[tuple[str, Chart]]:
    """The checks that are better seen: (title, chart)."""
    charts = []
    rungs = [(rung.step, rung.error) for rung in about.ladder]
    if any(error == error for _, error in rungs):
        charts.append(("Predicted and really reweighted", ladder(rungs, (RELIABLE, DOUBTFUL))))
    if about.growth_by_step:
        charts.append(("Growth of the adjoint", trace(about.growth_by_step, "step", "growth", log=True)))
    if about.drift:
        charts.append(("Drift of the replay", trace(about.drift_by_checkpoint, "checkpoint", "drift", log=True)))
    return charts
