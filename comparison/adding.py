"""What one machine measured beside what others did before: the same run's newer values take the older ones' place."""

from collections import Counter
from typing import Any

Rows = list[dict[str, Any]]

_OF_THE_CLEAN_RUN = ("status", "reason", "ratio", "peak_mib", "note", "machine")
"""Cost and status are those of the run with right labels, where there is one."""
_SIZES = ("examples", "queries", "removed", "subsets")


def added(kept: dict[str, Any], found: dict[str, Any], order: list[str]) -> dict[str, Any]:
    """Both together; a row's ``machine`` is its place in ``machines``, that of most rows first (0, left out).

    A task whose sizes have changed is another one: its older rows go.
    """
    machines = list(dict.fromkeys([*kept["machines"], *found["machines"]]))
    place = machines.index(found["machines"][0])
    tasks = dict(kept["tasks"])
    for name, task in found["tasks"].items():
        new = {method: [row | {"machine": place} for row in rows] for method, rows in task["methods"].items()}
        old = tasks.get(name)
        if old is None or any(old["about"][size] != task["about"][size] for size in _SIZES):
            tasks[name] = {"about": task["about"], "methods": new}
            continue
        about = task["about"] | {"training_seconds": _range(old["about"], task["about"])}
        methods = {
            method: _rows(old["methods"].get(method, []), new.get(method, []))
            for method in sorted({*old["methods"], *new}, key=order.index)
        }
        tasks[name] = {"about": about, "methods": methods}
    return _most_used_first(machines, tasks)


def _rows(old: Rows, new: Rows) -> Rows:
    rows = {row["seed"]: row for row in old}
    for row in new:
        before = rows.get(row["seed"], {})
        if before.get("clean") and not row.get("clean"):
            row = {key: value for key, value in row.items() if key not in _OF_THE_CLEAN_RUN}
        elif row.get("clean"):  # a refusal has a reason, an answer has costs: none of the other's stays
            before = {key: value for key, value in before.items() if key not in _OF_THE_CLEAN_RUN}
        rows[row["seed"]] = before | row
    return [rows[seed] for seed in sorted(rows)]


def _range(*abouts: dict[str, Any]) -> list[float] | None:
    ranges = [about["training_seconds"] for about in abouts if about["training_seconds"]]
    return [min(low for low, _ in ranges), max(high for _, high in ranges)] if ranges else None


def _most_used_first(machines: list[str], tasks: dict[str, Any]) -> dict[str, Any]:
    rows = [row for task in tasks.values() for rows in task["methods"].values() for row in rows]
    uses = Counter(row.get("machine", 0) for row in rows)
    ranking = [place for place, _ in uses.most_common()]
    renumbered = {
        name: {
            "about": task["about"],
            "methods": {m: [_on(row, ranking) for row in rows] for m, rows in task["methods"].items()},
        }
        for name, task in tasks.items()
    }
    return {"machines": [machines[place] for place in ranking], "tasks": renumbered}


def _on(row: dict[str, Any], ranking: list[int]) -> dict[str, Any]:
    place = ranking.index(row.get("machine", 0))
    rest = {key: value for key, value in row.items() if key != "machine"}
    return rest | {"machine": place} if place else rest
