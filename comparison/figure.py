"""The results as a picture: a panel a task, a row a method, so that no two labels can meet."""

import statistics
from pathlib import Path
from typing import Any

from comparison.results import ORDER, kind_of
from comparison.table import UNCHECKED, mean, times, values

_COLORS = {"hydragrad": "#0b7a75", "baseline": "#7d8790"}
_OTHERS = "#a4572a"
_LEFT, _RIGHT = -0.25, 1.05


def figure(tasks: dict[str, Any], path: Path) -> None:
    """Draw and save."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draw(tasks).savefig(path, dpi=110, metadata={"Software": None})


def draw(tasks: dict[str, Any]) -> Any:
    """Leave-one-out (filled) and LDS at 10 % (hollow) of every method, with its time in trainings at the right."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = {name: task for name, task in tasks.items() if task["about"]["removed"]}
    shown = [
        method
        for method in ORDER
        if method != UNCHECKED and any(values(task["methods"].get(method, []), "loo") for task in tasks.values())
    ]
    drawn = Figure(figsize=(2.2 + 2.3 * len(tasks), 1.6 + 0.235 * len(shown)), layout="constrained")
    FigureCanvasAgg(drawn)  # no screen and no global state
    panels = drawn.subplots(1, len(tasks), sharey=True, squeeze=False)[0]
    for axes, (name, task) in zip(panels, tasks.items(), strict=True):
        _panel(axes, name, task["methods"], shown)
    panels[0].set_yticks(range(len(shown)), shown, fontsize=8.5)
    panels[0].set_ylim(len(shown) - 0.4, -0.6)
    for label, method in zip(panels[0].get_yticklabels(), shown, strict=True):
        label.set_color(_color(method))
    _legend(drawn)
    return drawn


def _panel(axes: Any, name: str, methods: dict[str, Any], shown: list[str]) -> None:
    axes.axvline(0, color="#c9ced3", linewidth=1, zorder=1)
    for row, method in enumerate(shown):
        color, rows = _color(method), methods.get(method, [])
        if row % 2:
            axes.axhspan(row - 0.5, row + 0.5, color="#f4f6f7", zorder=0, linewidth=0)
        for column, filled, height in (("lds_10", False, row + 0.17), ("loo", True, row - 0.17)):
            found = values(rows, column)
            if found:
                middle = statistics.mean(found)
                axes.plot([min(found), max(found)], [height, height], color=color, linewidth=1.2, zorder=2)
                axes.scatter([middle], [height], s=26, marker="o" if filled else "s", zorder=3, edgecolors=color,
                             facecolors=color if filled else "white", linewidths=1.2)  # fmt: skip
        ratio = mean(rows, "ratio")
        if ratio is not None and values(rows, "loo"):
            axes.text(1.02, row, times(ratio), transform=axes.get_yaxis_transform(), fontsize=7.5, va="center")
    axes.set_xlim(_LEFT, _RIGHT)
    axes.set_title(name, loc="left", fontsize=10)
    axes.text(1.02, -0.9, "time", transform=axes.get_yaxis_transform(), fontsize=7.5, color="#5c6670", va="bottom")
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _legend(drawn: Any) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    grey = "#30363c"
    marks = [
        Line2D([], [], marker="o", color="none", markerfacecolor=grey, markeredgecolor=grey, label="leave-one-out"),
        Line2D(
            [], [], marker="s", color="none", markerfacecolor="white", markeredgecolor=grey, label="LDS, 10 % removed"
        ),
        Line2D([], [], color=grey, linewidth=1.2, label="range over seeds"),
        Patch(color=_COLORS["hydragrad"], label="hydragrad"),
        Patch(color=_COLORS["baseline"], label="others' methods in hydragrad"),
        Patch(color=_OTHERS, label="other libraries"),
    ]
    title = "rank correlation with what retraining gave; time of all scores, in trainings"
    drawn.legend(
        handles=marks, loc="outside lower center", ncols=6, fontsize=8, frameon=False, title=title, title_fontsize=8.5
    )


def _color(method: str) -> str:
    return _COLORS.get(kind_of(method), _OTHERS)
