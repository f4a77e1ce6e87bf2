"""`python -m comparison.table`: the results as a markdown table a task, and a figure."""

import argparse
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparison.__main__ import OUT
from comparison.environments import PEERS
from comparison.ours import METHODS
from comparison.tasks import TASKS

ORDER = [*METHODS, *(method for peer in PEERS for method in peer.methods)]
COLUMNS = {
    "loo": "LOO",
    "lds_1": "LDS 1 %",
    "lds_10": "LDS 10 %",
    "lds_30": "LDS 30 %",
    "harm.auroc": "AUROC, harm",
    "self.auroc": "AUROC, self",
    "self.recall": "recall, self",
    "ratio": "time",
    "peak_bytes": "memory, MiB",
}


def results(out: Path, task: str) -> dict[str, list[dict[str, Any]]]:
    """Method -> one flat result a seed; measures of the run with flipped labels beside those of the clean one."""
    found: dict[str, list[dict[str, Any]]] = {}
    for method in ORDER:
        for seed in sorted((out / task).glob("seed-*")):
            merged: dict[str, Any] = {}
            for kind in ("flipped", "clean"):  # cost and status are those of the clean run
                path = seed / kind / "results" / f"{method}.json"
                if path.is_file():
                    merged.update(_flat(json.loads(path.read_text())))
            if merged:
                found.setdefault(method, []).append(merged)
    return found


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        else:
            yield prefix + name, value


def cell(rows: list[dict[str, Any]], column: str) -> str:
    """The mean over seeds, with the standard deviation where there are several."""
    values = [row[column] for row in rows if isinstance(row.get(column), int | float)]
    if not values:
        return ""
    mean, spread = statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0.0
    if column == "peak_bytes":
        return f"{mean / 2**20:.0f}"
    if column == "ratio":
        return f"{mean:.3g} x"
    return f"{mean:.2f}" + (f" ± {spread:.2f}" if len(values) > 1 else "")


def table(out: Path, task: str) -> str:
    """One markdown table; methods without an answer are named below it with their reasons."""
    found = results(out, task)
    lines = ["| method | " + " | ".join(COLUMNS.values()) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    silent = []
    for method, rows in found.items():
        answered = [row for row in rows if row["status"] == "ok"]
        if answered:
            lines.append(f"| {method} | " + " | ".join(cell(answered, column) for column in COLUMNS) + " |")
        else:
            silent.append(f"- {method}: {rows[0]['status']}: {rows[0]['reason'].split('. ')[0]}")
    seeds = max((len(rows) for rows in found.values()), default=0)
    heading = f"### {task} ({seeds} seed{'s' if seeds != 1 else ''})"
    return "\n".join([heading, "", *lines, *(["", *silent] if silent else []), ""])


def figure(out: Path, tasks: list[str], path: Path) -> None:
    """Agreement with leave-one-out against cost, a panel a task."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    drawn = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    FigureCanvasAgg(drawn)  # no screen and no global state
    for place, task in enumerate(tasks, start=1):
        axes = drawn.add_subplot(rows, columns, place)
        axes.axhline(0, color="#c9ced3", linewidth=1)
        for method, found in results(out, task).items():
            points = [(row["ratio"], row["loo"]) for row in found if row.get("status") == "ok" and "loo" in row]
            if not points:
                continue
            x, y = (statistics.mean(values) for values in zip(*points, strict=True))
            ours = method in ("exact", "gauss-newton", "hessian-free")
            axes.scatter([x], [y], s=50 if ours else 28, color="#0b7a75" if ours else "#5c6670", zorder=3)
            axes.annotate(method, (x, y), textcoords="offset points", xytext=(5, 3), fontsize=7.5)
        axes.set_xscale("log")
        axes.set_ylim(top=1.05)
        axes.set_title(task, loc="left", fontsize=11)
        axes.set_xlabel("time of all scores, in plain trainings")
        axes.set_ylabel("Spearman with leave-one-out")
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path, dpi=130, metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    tasks = [task for task in TASKS if (options.out / task).is_dir()]
    if not tasks:
        raise SystemExit(f"there are no results in {options.out}: run `python -m comparison` first")
    text = "\n".join(table(options.out, task) for task in tasks)
    (options.out / "table.md").write_text(text)
    figure(options.out, tasks, options.out / "comparison.png")
    print(text)
    print(f"written to {options.out / 'table.md'} and {options.out / 'comparison.png'}")


if __name__ == "__main__":
    main()
