"""Long runs on one machine: a plan's memory and seconds against what is then measured.

`python -m benchmarks.scale` trains an MLP of 987,210 parameters for 20,000 steps on Fashion-MNIST (or, where that is
absent, on digits scaled up to its size), records it, opens the record, plans, attributes (`--queries 1 4 8` for several
numbers of queries), and prints predicted over measured. Every attribution is measured in a process of its own, by the
peak of its resident memory above what that was before planning, and by two clocks: the wall's, and one that stands
while other programs hold the processor, which is what a plan predicts. `--tiers` compares budgets on one recorded run:
a state for every step, fewer, states on disk too.
`--others` measures digits (360 queries), LeNet-5 and a convolutional network with BatchNorm. Linux only (/proc).
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import Subset, TensorDataset

import hydragrad as hg
from benchmarks.memory import peak, reset_peak
from benchmarks.workloads import Workload, _places, digits, fashion, loss
from hydragrad.hypergradient.clock import quiet_seconds

STEPS, BATCH, QUERIES = 20_000, 8, 8
METHODS = ("exact", "gauss-newton", "hessian-free")
USUAL = ["hessian-free", "exact"]
MEMORY, STORED = "1 GB", "1 GB"
TIERS = (("3 GB", None), ("1 GB", None), ("300 MB", None), ("150 MB", None), ("150 MB", "1 GB"))
"""Budgets in memory and on disk, for stretches of 200 steps: every state, fewer, binomial, some on disk too."""
GOAL, TOTAL = 0.25, 2 * 10**9
"""Relative error of a prediction; bytes resident in all."""


@dataclass(frozen=True)
class Row:
    """Predicted and measured, of one attribution."""

    workload: str
    method: str
    queries: int
    steps: int
    predicted_bytes: int
    measured_bytes: int
    planning_bytes: int
    resident_bytes: int
    predicted_seconds: float
    quiet_seconds: float
    wall_seconds: float
    planning_seconds: float
    plan: str

    def __str__(self) -> str:
        memory, seconds = self.predicted_bytes / self.measured_bytes, self.predicted_seconds / self.quiet_seconds
        return (
            f"{self.workload:9} {self.method:13} {self.queries:4} queries, {self.steps:6} steps: "
            f"memory {self.predicted_bytes / 1e6:6.0f} / {self.measured_bytes / 1e6:6.0f} MB = {memory:.2f} "
            f"(while planning {self.planning_bytes / 1e6:.0f}), "
            f"time {self.predicted_seconds:7.1f} / {self.quiet_seconds:7.1f} s = {seconds:.2f} "
            f"(by the wall {self.wall_seconds:.1f} s), resident {self.resident_bytes / 1e9:.2f} GB; {self.plan}"
        )


def million(steps: int) -> Workload:
    """987,210 parameters, batches of 8: a long run of cheap steps."""

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(784, 1000), nn.Tanh(), nn.Linear(1000, 200), nn.Tanh(), nn.Linear(200, 10))

    file = next((f for f in _places("fashion_mnist.npz") if f.is_file()), None)
    if file is None:
        images, labels = load_digits(return_X_y=True)
        x = np.kron(images.reshape(-1, 8, 8), np.ones((4, 4)))[:, 2:30, 2:30].reshape(-1, 784) / 16
        y, size = labels, 1437
    else:
        with np.load(file) as data:
            x, y, size = data["x_train"][:10_100].reshape(-1, 784) / 255, data["y_train"][:10_100], 10_000
    inputs, targets = torch.tensor(x, dtype=torch.float32), torch.tensor(y).long()
    train, test = TensorDataset(inputs[:size], targets[:size]), TensorDataset(inputs[size:], targets[size:])
    # a rate at which the exact adjoint stays finite over 20,000 steps; at 0.02 it overflows within 500
    return Workload("million", mlp, train, test, 0.001, 0.9, -(-steps * BATCH // size), BATCH)


def batch_norm() -> Workload | None:
    """A small convolutional network with BatchNorm on Fashion-MNIST."""
    base = fashion(2000, 2)
    if base is None:
        return None

    def build() -> nn.Module:
        def part(a: int, b: int) -> list[nn.Module]:
            return [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU(), nn.MaxPool2d(2)]

        return nn.Sequential(*part(1, 8), *part(8, 16), nn.Flatten(), nn.Linear(16 * 49, 10))

    return Workload("batchnorm", build, base.train, base.test, 0.05, 0.9, 2)


def workload_of(name: str, steps: int) -> Workload | None:
    made = {"million": lambda: million(steps), "digits": digits, "lenet": lambda: fashion(4000, 2)}
    return batch_norm() if name == "batchnorm" else made[name]()


def recorded(workload: Workload, folder: Path, steps: int | None, budget: str) -> dict[str, float]:
    """Train with and without recording; seconds a step, bytes on disk."""
    model = workload.model()
    optimizer = workload.optimizer(model)
    ids = workload.batches()[:steps]

    def step(batch: list[torch.Tensor]) -> None:
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        optimizer.step()

    def batches() -> Iterator[list[torch.Tensor]]:
        return ([tensor[i] for tensor in workload.train.tensors] for i in ids)

    few = [[tensor[i] for tensor in workload.train.tensors] for i in ids[:200]]
    began = time.perf_counter()
    for batch in few:
        step(batch)
    plain = (time.perf_counter() - began) / len(few)
    model = workload.model()
    optimizer = workload.optimizer(model)
    began = time.perf_counter()
    with hg.record(folder, model, optimizer, reduction="mean", checkpoint_bytes=budget) as recording:
        for batch in recording.batches(batches(), indices=ids):
            step(batch)
    seconds = time.perf_counter() - began
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"plain": plain, "recorded": seconds / len(ids), "bytes": size}


def measured(
    name: str, folder: Path, method: str, queries: int, steps: int, memory: str | None, disk: str | None
) -> Row:
    """Open, plan and attribute, in this process."""
    torch.set_num_threads(1)
    workload = workload_of(name, steps)
    assert workload is not None
    run = hg.load(folder, model=workload.model(), loss=loss, data=workload.train)
    few = Subset(workload.test, range(queries))
    warm_up()
    reset_peak()
    before = peak()
    given: dict[str, Any] = {"method": method, "memory": memory, "disk": disk, "compile": False}
    began = time.perf_counter()
    plan = hg.plan(run, few, **given)
    planned, tried = time.perf_counter() - began, peak()
    reset_peak()
    wall, quiet = time.perf_counter(), quiet_seconds()
    hg.attribute(run, few, check=False, progress=False, **given)
    quiet, wall = quiet_seconds() - quiet, time.perf_counter() - wall
    most = peak()
    return Row(
        name, method, queries, run.num_steps, plan.peak_bytes, most - before, tried - before, max(most, tried),
        plan.seconds, quiet, wall, planned, str(plan),
    )  # fmt: skip


def warm_up() -> None:
    """What torch imports when it is first used is not a sweep's memory: attribute a tiny run."""
    data = TensorDataset(torch.rand(64, 4), torch.randint(0, 2, (64,)))
    model = nn.Linear(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = [[k % 64, (k + 1) % 64] for k in range(120)]
    with tempfile.TemporaryDirectory() as folder:
        with hg.record(folder, model, optimizer, overwrite=True) as recording:
            for batch in recording.batches(([t[i] for t in data.tensors] for i in ids), indices=ids):
                optimizer.zero_grad()
                loss(model, batch).mean().backward()
                optimizer.step()
        run = hg.load(folder, model=model, loss=loss, data=data)
        for method in ("exact", "gauss-newton", "hessian-free"):
            hg.attribute(run, data, method=method, check=False, progress=False, compile=False)


def apart(*arguments: object) -> Row:
    """``measured`` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.scale", "--one", json.dumps(arguments, default=str)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Row(**json.loads(done.stdout.splitlines()[-1]))


def opened(folder: Path, workload: Workload) -> float:
    began = time.perf_counter()
    hg.load(folder, model=workload.model(), loss=loss, data=workload.train)
    return time.perf_counter() - began


Work = tuple[str, str, int, str | None, str | None]
"""Workload, method, queries, memory, disk."""


def works(
    queries: list[int], methods: list[str], *, tiers: bool, others: bool, within: str | None = None
) -> list[Work]:
    """What is asked for, workload by workload."""
    if tiers:
        return [("million", "exact", queries[0], memory, disk) for memory, disk in TIERS]
    work: list[Work] = [("million", m, count, MEMORY, None) for count in queries for m in methods]
    if others:
        counts = (("digits", 360), ("lenet", 64), ("batchnorm", 32))
        work += [(name, method, count, within, None) for name, count in counts for method in METHODS]
    return work


def rows(folder: Path, steps: int, stored: str, work: list[Work]) -> Iterator[Row]:
    """Every measurement, as they come; training too with one thread, or its replay would round otherwise."""
    torch.set_num_threads(1)
    for name, group in itertools.groupby(work, key=lambda each: each[0]):
        workload = workload_of(name, steps)
        if workload is None:
            print(
                f"{name}: Fashion-MNIST is not here (set HYDRAGRAD_DATA to the folder of fashion_mnist.npz): left out"
            )
            continue
        found = recorded(workload, folder / name, steps if name == "million" else None, stored)
        print(
            f"{name}: a plain step {1000 * found['plain']:.2f} ms, recorded {1000 * found['recorded']:.2f} ms; "
            f"{found['bytes'] / 1e6:.0f} MB on disk, opened in {opened(folder / name, workload):.2f} s",
            flush=True,
        )
        for _, method, count, memory, disk in group:
            yield apart(name, folder / name, method, count, steps, memory, disk)


def main() -> None:
    parser = argparse.ArgumentParser(description="A plan's memory and time, predicted over measured.")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--queries", type=int, nargs="+", default=[QUERIES])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=USUAL)
    parser.add_argument("--stored", default=STORED, help="budget of the states stored while recording")
    parser.add_argument("--tiers", action="store_true", help="budgets of one sweep instead")
    parser.add_argument("--others", action="store_true", help="digits, LeNet-5 and a BatchNorm network too")
    parser.add_argument("--within", help="budget of memory of these (default: none)")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one is not None:
        name, folder, *rest = json.loads(options.one)
        print(json.dumps(asdict(measured(name, Path(folder), *rest))))
        return
    print(f"goals: both ratios within {GOAL:.0%} of 1, resident memory below {TOTAL / 1e9:.0f} GB")
    work = works(options.queries, options.methods, tiers=options.tiers, others=options.others, within=options.within)
    with tempfile.TemporaryDirectory() as folder:
        for row in rows(Path(folder), options.steps, options.stored, work):
            print(row, flush=True)


if __name__ == "__main__":
    main()
