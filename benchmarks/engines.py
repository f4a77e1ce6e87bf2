"""One step's products by every engine and block size, in training steps per query: what bounds a sweep.

`python -m benchmarks.engines digits --blocks 1 16 60 120 --compile`; also the machine's rate for matrix products of
the sizes that occur, which bounds what any engine can reach.
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.workloads import Workload, cifar, digits, fashion
from hydragrad.hypergradient import exact, gauss_newton, hessian_free
from hydragrad.hypergradient.costs import probe_block, products, seconds_of
from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.pages import kept_pages
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.scaled import PerExampleGradients, ScaledEngine
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tracing import Traced
from hydragrad.step.objective import Objective
from hydragrad.trajectory.moments import forwards

CPU = torch.device("cpu")


def engines(objective: Objective, *, compile: bool) -> list[Engine | ScaledEngine]:
    plain: list[Engine] = [
        exact.ForwardOverReverse(objective),
        exact.ReverseOverReverse(objective),
        exact.ReverseOverForward(objective),
        gauss_newton.JvpThenVjp(objective),
        hessian_free.Jvp(objective),
    ]
    made: list[Engine | ScaledEngine] = [*plain, *(Traced(engine) for engine in plain), PerExampleGradients(objective)]
    if compile:
        made += [Traced(plain[0], compile=True), Traced(plain[3], compile=True)]
    return made


def matrix_rate(rows: int, inner: int, columns: int) -> float:
    """GFLOP/s of one matrix product."""
    a, b, out = torch.randn(rows, inner), torch.randn(inner, columns), torch.empty(rows, columns)
    return 2e-9 * rows * inner * columns / seconds_of(lambda: torch.mm(a, b, out=out), CPU, repeats=20)


def table(workload: Workload, blocks: list[int], *, compile: bool) -> None:
    collated = workload.collated()

    def step_seconds() -> float:
        return seconds_of(lambda: workload.plain(collated), CPU, repeats=3) / len(collated)

    with tempfile.TemporaryDirectory() as folder, kept_pages():
        sweep = Sweep.of(workload.recorded(Path(folder) / "run"))
        point = next(points_of(next(forwards(sweep.replayer, sweep.run.trajectory, 1)), sweep.objective))[2]
        print(f"training step {1e3 * step_seconds():.3f} ms; columns: blocks of {blocks}, steps per query")
        with sweep.objective.differentiable():
            for engine in engines(sweep.objective, compile=compile):
                cells, first = [], 0.0
                for block in blocks:
                    gam = probe_block(point, block)
                    unit = step_seconds()
                    began = time.perf_counter()
                    at = replace(point)  # what an engine computes once a point is not counted
                    work: Callable[[], object] = lambda e=engine, g=gam, at=at: products(e, at, g)  # noqa: E731
                    work()
                    first = time.perf_counter() - began
                    cells.append(f"{seconds_of(work, CPU) / unit / block:7.3f}")
                print(f"{engine!r:62}", *cells, f"  first call {first:.1f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("workload", choices=["digits", "fashion", "cifar"])
    parser.add_argument("--blocks", type=int, nargs="+", default=[1, 16, 60, 120])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    makers = {"digits": lambda: digits(3), "fashion": lambda: fashion(2000, 1), "cifar": lambda: cifar(640)}
    workload = makers[options.workload]()
    if workload is None:
        raise SystemExit("the data is not here: set HYDRAGRAD_DATA to the folder of fashion_mnist.npz, cifar10_6k.npz")
    print(f"matrix products: 3840 x 64 x 128 at {matrix_rate(3840, 64, 128):.0f} GFLOP/s")
    table(workload, options.blocks, compile=options.compile)


if __name__ == "__main__":
    main()
