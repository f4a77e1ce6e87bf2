"""Cost of attribution per query, in units of one plain training run of the same loop, measured in the same process."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Subset

import hydragrad as hg
from benchmarks.workloads import Workload, cifar, digits, fashion

METHODS = ("exact", "gauss-newton", "hessian-free")
# Goals for (workload, number of queries, compiled): ratio per query by method. One query alone rises by 1.0 where the
# steps are replayed rather than kept, and they are. None: nothing was aimed at.
GOALS: dict[tuple[str, int, bool], tuple[float | None, ...]] = {
    ("digits", 360, False): (0.2, 0.13, 0.05),
    ("digits", 360, True): (0.1, 0.07, 0.05),
    ("digits", 1, False): (3.2 + 1, 3.0 + 1, 1.3 + 1),
    ("fashion", 64, False): (0.75, 0.45, 0.05),
    ("fashion", 1, False): (2.5 + 1, 1.6 + 1, 1.2 + 1),
    ("cifar", 32, False): (1.7, None, None),
    ("cifar", 32, True): (1.2, None, None),
}


@dataclass(frozen=True)
class Row:
    """One measurement. ``ratio``: seconds / queries / training seconds, planning and replay counted."""

    workload: str
    method: str
    queries: int
    compiled: bool
    ratio: float
    goal: float | None
    seconds: float
    training_seconds: float
    compile_seconds: float
    plan: str


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def measure(workload: Workload, run: hg.Run, queries: int, compiled: bool, repeats: int = 3) -> Iterator[Row]:
    collated = workload.collated()
    workload.plain(collated)
    asked = Subset(workload.test, range(queries))
    for position, method in enumerate(METHODS):
        if compiled and method == "hessian-free":
            continue
        first, _ = clock(lambda m=method: attribute(run, asked, m, compiled)) if compiled else (0.0, None)
        training, attributing, last = [], [], None
        for _ in range(repeats):  # in turns, so that both meet the machine in the same state
            training.append(clock(lambda: workload.plain(collated))[0])
            seconds, last = clock(lambda m=method: attribute(run, asked, m, compiled))
            attributing.append(seconds)
            training.append(clock(lambda: workload.plain(collated))[0])
        assert last is not None
        unit, seconds = statistics.median(training), statistics.median(attributing)
        yield Row(
            workload.name,
            method,
            queries,
            compiled,
            seconds / queries / unit,
            GOALS[workload.name, queries, compiled][position],
            seconds,
            unit,
            max(first - seconds, 0.0),
            last.diagnostics.plan,
        )


def attribute(run: hg.Run, asked: Any, method: str, compiled: bool) -> hg.Attribution:
    return hg.attribute(run, asked, method=method, compile=compiled, check=False, progress=False)


def all_rows(folder: Path, *, compile: bool = True) -> Iterator[dict[str, Any]]:
    """Every row of the table, as they come."""
    work = digits()
    run = work.recorded(folder / "digits")
    for queries, compiled in ((360, False), (360, True), (1, False)):
        if compile or not compiled:
            yield from map(asdict, measure(work, run, queries, compiled))
    for made, counts in ((fashion(), ((64, False), (1, False))), (cifar(), ((32, False), (32, True)))):
        if made is None:
            print("fashion_mnist.npz or cifar10_6k.npz is not here (set HYDRAGRAD_DATA to its folder): rows left out")
            continue
        run = made.recorded(folder / made.name)
        for queries, compiled in counts:
            if compile or not compiled:
                yield from map(asdict, measure(made, run, queries, compiled))
