"""`python -m comparison.results`: what was measured, in one small file that is kept: comparison/results.json.

{"machines": [...], "tasks": {TASK: {"about": {...}, "methods": {METHOD: [{"seed": 0, "loo": ...}, ...]}}}}

A row that was measured on another machine than the first has its place in "machines" as "machine".
"""

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from comparison.__main__ import OUT, ROOT
from comparison.adding import added
from comparison.environments import PEERS
from comparison.exchange import Folder, write_text
from comparison.ours import HYPERGRADIENTS, METHODS, SIGNALS
from comparison.tasks import TASKS, Spec

KEPT = ROOT / "comparison" / "results.json"
ORDER = [*METHODS, *(method for peer in PEERS for method in peer.methods)]
_LEFT_OUT = ("torch", "seconds", "training_seconds", "peak_bytes")
_DIGITS = 4


def kind_of(method: str) -> str:
    """Whose it is: "hydragrad", "baseline" (others' methods in hydragrad) or the library's name."""
    if method in HYPERGRADIENTS or method in SIGNALS:
        return "hydragrad"
    return next((peer.name for peer in PEERS if method in peer.methods), "baseline")


def collect(out: Path) -> dict[str, Any]:
    """Everything that `python -m comparison` left in a folder."""
    tasks = {name: _task(out, spec) for name, spec in TASKS.items() if any((out / name).glob("seed-*/*/results"))}
    return {"machines": [_machine()], "tasks": tasks}


def _task(out: Path, spec: Spec) -> dict[str, Any]:
    found: dict[str, list[dict[str, Any]]] = {}
    units: list[float] = []
    for method in ORDER:
        for seed in sorted((out / spec.name).glob("seed-*"), key=lambda path: int(path.name[5:])):
            merged: dict[str, Any] = {}
            for run in ("flipped", "clean"):  # cost and status are those of the clean run
                path = seed / run / "results" / f"{method}.json"
                if path.is_file():
                    result = json.loads(path.read_text())
                    units += [result["training_seconds"]] if "training_seconds" in result else []
                    merged |= dict(_flat(result)) | {run: True}
            if merged:
                found.setdefault(method, []).append({"seed": int(seed.name[5:]), **merged})
    first = next((out / spec.name).glob("seed-*/*/about.json"))
    about = {
        "examples": _examples(first),
        "queries": spec.queries,
        "removed": spec.removed,
        "subsets": spec.subsets,
        "training_seconds": [round(min(units), 3), round(max(units), 3)] if units else None,
    }
    return {"about": about, "methods": found}


def _examples(about: Path) -> int:
    return len(Folder(about.parent).train)


def _flat(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{name}.")
        elif isinstance(value, float) and name not in _LEFT_OUT:
            yield prefix + name, float(f"{value:.{_DIGITS}g}")
        elif name not in _LEFT_OUT:
            yield prefix + name, value
        elif name == "peak_bytes":
            yield "peak_mib", round(value / 2**20)


def _machine() -> str:
    """Processor and torch; the operating system's own name of the first, where it has one."""
    import torch

    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor() or platform.machine()
    return f"{processor}, torch {torch.__version__.split('+')[0]}, one thread"


def load() -> dict[str, Any]:
    """What is kept."""
    return json.loads(KEPT.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--add", action="store_true", help="keep what was measured before beside it")
    options = parser.parse_args()
    found = collect(options.out)
    if not found["tasks"]:
        raise SystemExit(f"there are no results in {options.out}: run `python -m comparison` first")
    if options.add:
        found = added(load(), found, ORDER)
    write_text(KEPT, one_row_a_line(found) + "\n")
    print(f"written to {KEPT}: {', '.join(found['tasks'])}")


def one_row_a_line(found: dict[str, Any]) -> str:
    """JSON whose changes can be read in a diff."""
    tasks = []
    for name, task in found["tasks"].items():
        methods = []
        for method, rows in task["methods"].items():
            lines = ",\n    ".join(json.dumps(row, ensure_ascii=False) for row in rows)
            methods.append(f"   {json.dumps(method)}: [\n    {lines}\n   ]")
        body = ",\n".join(methods)
        tasks.append(
            f'  {json.dumps(name)}: {{\n   "about": {json.dumps(task["about"])},\n   "methods": {{\n{body}\n   }}\n  }}'
        )
    return f'{{\n "machines": {json.dumps(found["machines"])},\n "tasks": {{\n' + ",\n".join(tasks) + "\n }\n}"


if __name__ == "__main__":
    main()
