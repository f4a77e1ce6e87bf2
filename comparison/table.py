"""The results as markdown: a table a task, and one over all tasks."""

import re
import statistics
from collections.abc import Callable
from typing import Any

from comparison.results import ORDER, kind_of

Rows = list[dict[str, Any]]
Rivals = Callable[[str, str], bool]
"""Whether the first is to be compared with the second."""

COLUMNS = {
    "loo": "LOO",
    "lds_1": "LDS 1 %",
    "lds_10": "LDS 10 %",
    "lds_30": "LDS 30 %",
    "harm.auroc": "AUROC, harm",
    "self.auroc": "AUROC, self",
    "self.recall": "recall, self",
    "ratio": "time",
    "peak_mib": "memory, MiB",
}
_COSTS = ("ratio", "peak_mib")
_SOLVED = 0.1
"""Relative residual above which a linear system is told as unsolved."""
SAME_DERIVATIVE, UNCHECKED = "bergson-magic", "exact-unchecked"


def values(rows: Rows, column: str) -> list[float]:
    """Of the rows with an answer; costs of the first machine alone, where it measured any."""
    if column in _COSTS:
        rows = [row for row in rows if column in row and not row.get("machine")] or rows
    return [row[column] for row in rows if row.get("status") == "ok" and isinstance(row.get(column), int | float)]


def mean(rows: Rows, column: str) -> float | None:
    found = values(rows, column)
    return statistics.mean(found) if found else None


def cell(rows: Rows, column: str) -> str:
    """The mean over seeds, with the standard deviation where there are several."""
    found = values(rows, column)
    if not found:
        return ""
    middle = statistics.mean(found)
    if column == "peak_mib":
        return f"{middle:.0f}"
    if column == "ratio":
        return f"{times(middle)} x" + ("†" if all(row.get("machine") for row in rows if column in row) else "")
    digits = 3 if column.startswith("self.") else 2  # what is that near to 1 is told apart by the third
    spread = f" ± {statistics.stdev(found):.{digits}f}" if len(found) > 1 else ""
    return f"{middle:.{digits}f}" + spread


def times(ratio: float) -> str:
    """Three digits, and all that stand before the point."""
    return f"{ratio:.0f}" if ratio >= 1000 else f"{ratio:.3g}"


def table(name: str, task: dict[str, Any]) -> str:
    """One markdown table; methods without an answer are named below it with their reasons."""
    lines = [
        "| method | " + " | ".join(COLUMNS.values()) + " | seeds |",
        "|---" * (len(COLUMNS) + 2) + "|",
    ]
    silent: list[str] = []
    for method, rows in task["methods"].items():
        answered = [row for row in rows if row["status"] == "ok"]
        if answered:
            shown = f"**{method}**" if kind_of(method) == "hydragrad" else method
            cells = " | ".join(cell(answered, column) for column in COLUMNS)
            lines.append(f"| {shown} | {cells} | {_seeds(answered)} |")
        silent += [
            f"- {method}, seed {row['seed']}: {row['status']}: {row['reason'].split('. ')[0]}"
            for row in rows
            if row["status"] != "ok"
        ]
    silent += _unsolved(task["methods"])
    absent = [method for method in ORDER if method not in task["methods"]]
    if absent:
        silent.append(f"- not run on this task: {', '.join(absent)}")
    return "\n".join([f"### {name}", "", _facts(task), "", *lines, *(["", *silent] if silent else []), ""])


def _unsolved(methods: dict[str, Rows]) -> list[str]:
    """Methods whose linear systems were left unsolved, and by how much at worst."""
    found: list[str] = []
    for method, rows in methods.items():
        left = [float(x) for row in rows for x in re.findall(r"relative residual of ([\d.e+-]+)", row.get("note", ""))]
        if left and max(left) > _SOLVED:
            found.append(f"- {method}: its linear systems were left at a relative residual of {max(left):.2g}")
    return found


def _facts(task: dict[str, Any]) -> str:
    about = task["about"]
    low, high = about["training_seconds"] or (0.0, 0.0)
    if not about["removed"]:
        return f"{about['examples']} training examples, {about['queries']} queries; cost alone, nothing was retrained."
    return (
        f"{about['examples']} training examples, {about['queries']} queries; {about['removed']} examples left out one "
        f"by one, {about['subsets']} subsets of each size left out together; a training took {low:.2g} to {high:.2g} s."
    )


def _seeds(rows: Rows) -> str:
    """Seeds of the run with right labels / of the one with flipped labels."""
    return f"{sum(bool(row.get('clean')) for row in rows)} / {sum(bool(row.get('flipped')) for row in rows)}"


def summary(tasks: dict[str, Any]) -> str:
    """One line a task: hydragrad's methods beside the best of the others."""
    heads = ["LOO: exact", "best other", "LDS 10 %: exact", "smoothed", "best other"]
    heads += ["wrong labels, AUROC: el2n", "ensemble", "best other"]
    lines = ["| task | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, task in tasks.items():
        methods = task["methods"]
        if not task["about"]["removed"]:
            continue
        cells = [
            cell(methods.get("exact", []), "loo"),
            best(methods, "loo"),
            cell(methods.get("exact", []), "lds_10"),
            cell(methods.get("smoothed", []), "lds_10"),
            best(methods, "lds_10"),
            cell(methods.get("el2n", []), "self.auroc"),
            cell(methods.get("ensemble", []), "self.auroc"),
            best(methods, "self.auroc"),
        ]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


_CLAIMS = (
    ("LOO", "exact", "loo", 2),
    ("LDS 1 %", "exact", "lds_1", 2),
    ("LDS 10 %", "exact", "lds_10", 2),
    ("LDS 30 %", "exact", "lds_30", 2),
    ("LDS 10 %", "smoothed", "lds_10", 2),
    ("LDS 30 %", "smoothed", "lds_30", 2),
    ("wrong labels, AUROC", "el2n", "self.auroc", 3),
    ("wrong labels, AUROC", "ensemble", "self.auroc", 3),
    ("wrong labels, recall in the first tenth", "el2n", "self.recall", 3),
    ("wrong labels, recall in the first tenth", "ensemble", "self.recall", 3),
)
_AMONG_ALL = (("LDS 10 %", "smoothed", "lds_10", 2), ("LDS 30 %", "smoothed", "lds_30", 2))


def findings(tasks: dict[str, Any]) -> str:
    """In words: where hydragrad's method is first among all that is not hydragrad's (MAGIC left out), where not."""
    return "\n".join(_finding(tasks, *claim, _others) for claim in _CLAIMS if _judged(tasks, *claim[1:3], _others))


def among_all(tasks: dict[str, Any]) -> str:
    """The same with hydragrad's own methods and MAGIC among the rivals."""
    return "\n".join(_finding(tasks, *claim, _all) for claim in _AMONG_ALL if _judged(tasks, *claim[1:3], _all))


def _finding(tasks: dict[str, Any], what: str, method: str, column: str, digits: int, rivals: Rivals) -> str:
    first, behind = [], []
    for name, verdict in _judged(tasks, method, column, rivals).items():
        if verdict is None:
            first.append(name)
        else:
            rival, theirs, own, seeds = verdict
            over = f", {seeds} seeds" if seeds > 1 else ", one seed"
            behind.append(f"{name} ({rival} {theirs:.{digits}f} against {own:.{digits}f}{over})")
    words = [f"{start} on {', '.join(found)}" for start, found in (("first", first), ("not first", behind)) if found]
    return f"- **{what}**: `{method}` is {'; '.join(words)}."


def _judged(
    tasks: dict[str, Any], method: str, column: str, rivals: Rivals
) -> dict[str, tuple[str, float, float, int] | None]:
    """For each task with a comparison: None where nobody is ahead, else who is furthest, and both means.

    Two methods are compared on the seeds that both were run on: a seed's run is easy or hard for all alike.
    """
    found: dict[str, tuple[str, float, float, int] | None] = {}
    for name, task in tasks.items():
        own = by_seed(task["methods"].get(method, []), column)
        pairs = {rival: by_seed(rows, column) for rival, rows in task["methods"].items() if rivals(rival, method)}
        both = {rival: sorted(own.keys() & theirs.keys()) for rival, theirs in pairs.items()}
        means = {
            rival: (statistics.mean(pairs[rival][s] for s in seeds), statistics.mean(own[s] for s in seeds), len(seeds))
            for rival, seeds in both.items()
            if seeds
        }
        if means:
            ahead = max(means, key=lambda rival: means[rival][0] - means[rival][1])
            found[name] = (ahead, *means[ahead]) if means[ahead][0] > means[ahead][1] else None
    return found


def by_seed(rows: Rows, column: str) -> dict[int, float]:
    return {row["seed"]: row[column] for row in rows if values([row], column)}


def _others(rival: str, _: str) -> bool:
    """What is not hydragrad's, MAGIC left out: it is the same derivative as `exact`."""
    return kind_of(rival) != "hydragrad" and rival != SAME_DERIVATIVE


def _all(rival: str, method: str) -> bool:
    return rival not in (method, UNCHECKED)


def best(methods: dict[str, Rows], column: str) -> str:
    """The best of the others as a cell, with its name."""
    first, value = best_of(methods, column)
    return "" if value is None else f"{cell(methods[first], column)} ({first})"


def best_of(methods: dict[str, Rows], column: str) -> tuple[str, float | None]:
    """The best mean of the others, each over its own seeds."""
    found = {
        method: value
        for method, rows in methods.items()
        if _others(method, "") and (value := mean(rows, column)) is not None
    }
    first = max(found, key=found.__getitem__, default="")
    return first, found.get(first)


def costs(tasks: dict[str, Any]) -> str:
    """Time of all scores, in trainings, against what is exact too and against what people use, none of them checked."""
    measured = ("exact", UNCHECKED, "dattri-if-cg", SAME_DERIVATIVE)
    heads = ["queries", "exact", "unchecked", *measured[2:], "a query: unchecked", "MAGIC", "MAGIC / unchecked"]
    lines = ["| task | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, task in tasks.items():
        methods, queries = task["methods"], task["about"]["queries"]
        plain, magic = (mean(methods.get(method, []), "ratio") for method in (UNCHECKED, SAME_DERIVATIVE))
        cells = [str(queries), *(cell(methods.get(method, []), "ratio") for method in measured)]
        cells += [_number(plain and plain / queries), _number(magic and magic / queries)]
        cells.append(_number(plain and magic and magic / plain))
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return f"{value:.2g}" if value else ""
