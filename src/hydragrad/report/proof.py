"""A validation to look at: predicted against real changes, or curves of removal."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydragrad.report.charts import Chart, curves, scatter
from hydragrad.report.content import Proof
from hydragrad.report.pictures import FAINT, HARMED, HELPED, INK, QUIET, figure_on_file

if TYPE_CHECKING:
    from hydragrad.validation import Validation

_COLOURS = {"helpful": HELPED, "harmful": HARMED, "random": QUIET}
_MOST = 20_000
"""Points that a scatter shows; more are thinned evenly."""


def draw_validation(path: str | Path, validation: "Validation", *, dpi: int = 130) -> Path:
    """Write a PNG of a validation; raises UnsupportedError without matplotlib."""
    figure, save = figure_on_file(6.4, 5.2)
    axes = figure.add_axes((0.14, 0.13, 0.82, 0.76))
    axes.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if validation.metric == "remove":
        _curves(axes, validation)
    else:
        _scatter(axes, validation)
    return save(path, dpi)


def proof_of(validation: "Validation") -> Proof:
    """A validation for a page: what was done, how well it agrees, a chart."""
    n, M = validation.actual.shape
    words = [
        f"{n} retrainings, {M} queries, seed {validation.seed}. Rank correlation of predicted and real change: "
        f"{validation.agreement}.",
        f"{validation.conclusion[:1].upper()}{validation.conclusion[1:]}.",
        *(f"{note[:1].upper()}{note[1:]}." for note in validation.notes),
    ]
    return Proof(f"{validation.method} scores against {validation.what}", words, _chart(validation, words[0]))


def _chart(validation: "Validation", words: str) -> Chart | None:
    kept = validation.finite
    if not bool(kept.any()):
        return None
    if validation.metric != "remove":
        predicted, actual = (x[kept].flatten().double() for x in (validation.predicted, validation.actual))
        return scatter(predicted, actual, words)
    found = validation.curves(_first_target(validation))
    return curves({kind: [(p.size, p.predicted, p.actual) for p in points] for kind, points in found.items()}, words)


def _first_target(validation: "Validation") -> int | None:
    """The first query (None: their mean) that removal was aimed at."""
    return next(item.target for item in validation.items if item.kind == "helpful")


def _scatter(axes: Any, validation: "Validation") -> None:
    kept = validation.finite
    x, y = validation.predicted[kept].flatten(), validation.actual[kept].flatten()
    every = -(-len(x) // _MOST)
    axes.scatter(x[::every].numpy(), y[::every].numpy(), s=9, alpha=0.5, linewidths=0, color=HELPED)
    low, high = float(min(x.min(), y.min())), float(max(x.max(), y.max()))
    axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle="--", label="predicted = real")
    axes.set_xlabel("predicted change of a query (sum of scores)", color=INK)
    axes.set_ylabel("real change, retrained", color=INK)
    axes.set_title(_title(validation, f"rank correlation {validation.agreement}"), fontsize=11, color=INK)
    axes.legend(frameon=False, loc="upper left")


def _curves(axes: Any, validation: "Validation") -> None:
    target = _first_target(validation)
    for kind, points in validation.curves(target).items():
        sizes = [0, *(p.size for p in points)]
        axes.plot(sizes, [0.0, *(p.actual for p in points)], color=_COLOURS[kind], marker="o", label=kind)
        axes.plot(sizes, [0.0, *(p.predicted for p in points)], color=_COLOURS[kind], linestyle=":", linewidth=1)
    whose = "the mean query" if target is None else f"query {target}"
    axes.set_xlabel("training examples (or groups) removed", color=INK)
    axes.set_ylabel(f"change of {whose}", color=INK)
    axes.set_title(_title(validation, "real change (line) and predicted (dotted)"), fontsize=11, color=INK)
    axes.legend(frameon=False)


def _title(validation: "Validation", words: str) -> str:
    return f"{validation.method} scores, seed {validation.seed}\n{words}"
