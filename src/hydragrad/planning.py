"""Before the run: which engine, how many queries at a time, how much memory, how long."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, final

import torch

from hydragrad.errors import UnsupportedError, message
from hydragrad.hypergradient.choosing import Chosen, Fixed, choose, fixed
from hydragrad.hypergradient.engines import check_method
from hydragrad.hypergradient.naming import name_of
from hydragrad.hypergradient.queries import length_of
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.run import Run
from hydragrad.smoothing import check_smoothing

PIECE_SECONDS = 60.0
"""What a piece of a resumable attribution should take at most; longer where its replay alone takes half of that."""


@final
@dataclass(frozen=True)
class Plan:
    """What a sweep will do. ``str(plan)`` says it in words.

    ``engine``: the computation chosen; ``block``: queries per product; ``carried``: queries whose adjoints one sweep
    carries; ``sweeps``: passes over the run (over all reweighted runs together, of which there are ``reweighted``; 0:
    the recorded run itself); ``segment``: states kept at a time; ``peak_bytes``: memory above
    training's, the result included; ``seconds``: predicted; ``budget``: bytes allowed; ``reasons``: why;
    ``gradient_gap``: relative difference between the gradient that is differentiated and the training step's.
    """

    method: str
    queries: int
    engine: str
    block: int
    carried: int
    sweeps: int
    segment: int
    peak_bytes: int
    seconds: float
    budget: int
    reasons: tuple[str, ...]
    chosen: Chosen = field(repr=False, compare=False)
    fixed: Fixed = field(repr=False, compare=False)
    reweighted: int = 0

    @property
    def gradient_gap(self) -> float:
        return self.chosen.gradient_gap

    def __str__(self) -> str:
        runs = f" over {self.reweighted} reweighted run(s)" if self.reweighted else ""
        return (
            f"{self.method}, {self.queries} queries: {self.engine}, {self.block} at a time, {self.sweeps} sweep(s) of "
            f"{self.carried}{runs}, {self.segment} states kept; about {self.peak_bytes / 2**20:.0f} MiB, "
            f"{self.seconds:.1f} s" + "".join(f"; {reason}" for reason in self.reasons)
        )


def plan(
    run: Run,
    queries: Any,
    method: str = "exact",
    *,
    rows: int | None = None,
    step: int | None = None,
    memory: int | None = None,
    block: int | None = None,
    compile: bool | None = None,
    smoothing: int | None = None,
) -> Plan:
    """Predict memory and time of ``attribute`` and choose how to do it.

    ``queries``: their number, or the queries; ``memory``: budget in bytes above training's (None: half of what is
    free); ``block``: queries per product (None: measured); ``compile``: use torch.compile (None: where it pays);
    ``smoothing``: so many reweighted runs are swept in place of the recorded one.
    Runs the candidates for a moment on one recorded batch. Example: ``print(hydragrad.plan(run, queries=1000))``.
    """
    check_smoothing(smoothing)
    count = queries if isinstance(queries, int) else length_of(queries)
    return plan_sweep(
        Sweep.of(run, step),
        count,
        method,
        rows=rows,
        memory=memory,
        block=block,
        compile=compile,
        reweighted=smoothing or 0,
    )


def plan_sweep(
    sweep: Sweep,
    queries: int,
    method: str,
    *,
    rows: int | None,
    memory: int | None,
    block: int | None,
    compile: bool | None,
    pieces: bool = False,
    again: Fixed | None = None,
    reweighted: int = 0,
) -> Plan:
    """``plan`` for a sweep that is made ready already; in ``pieces`` of about a minute, or as chosen before.

    ``reweighted`` runs have no states on disk: each is replayed once more, and keeps about sqrt(T) states on the way.
    """
    for name, value in (("queries", queries), ("block", block), ("memory", memory)):
        if value is not None and value < 1:
            raise UnsupportedError(message(f"{name} is too small", expected="at least 1", got=value))
    check_method(method)
    device = sweep.replayer.device
    budget = memory if memory is not None else _free(device) // 2
    if again is None:
        chosen = choose(sweep, queries, method, memory=budget, block=block, compile=compile)
    else:
        chosen = fixed(sweep, method, again.engine, again.block)
    rows = sweep.run.num_examples if rows is None else rows
    sizes = chosen.sizes
    result = rows * queries * sizes.number
    # what every choice needs: the block's engine, the result (its copy on the device while a sweep lasts)
    left = max(budget - result - chosen.block * sizes.engine - chosen.held, 0)
    longest, kept = (math.isqrt(sweep.stop - 1) + 1, 2 * sizes.state) if reweighted else (sizes.longest, sizes.state)
    segment = max(2, min(longest, min(left // 4, left - sizes.adjoint - rows * sizes.number) // kept))
    segment = segment if again is None else again.segment
    left = max(left - segment * kept, 0)
    carried = max(1, min(queries, left // (sizes.adjoint + rows * sizes.number)))
    replay = sweep.stop * chosen.replay * (1 if segment >= longest else 2)
    if pieces:
        wanted = max(PIECE_SECONDS - replay, replay) / (sweep.stop * chosen.per_query)
        carried = min(carried, max(chosen.block, int(wanted)))
    carried = -(-queries // -(-queries // carried)) if again is None else again.carried
    sweeps = -(-queries // carried)
    chosen = chosen.limited(carried)
    if pieces and again is None:  # as a later call will make it
        made = fixed(sweep, method, name_of(chosen.engine), chosen.block)
        chosen = replace(made, reasons=chosen.reasons)
    seconds = sweeps * replay + sweep.stop * queries * chosen.per_query
    if reweighted:
        seconds, sweeps = reweighted * (seconds + sweep.stop * chosen.replay), reweighted * sweeps
    peak = result + chosen.block * sizes.engine + chosen.held + segment * kept
    peak += carried * (sizes.adjoint + rows * sizes.number)
    return Plan(
        method,
        queries,
        repr(chosen.engine).strip("<>"),
        chosen.block,
        carried,
        sweeps,
        segment,
        peak,
        seconds,
        budget,
        (*chosen.reasons, *_reasons(peak, budget, seconds / sweeps, pieces, again)),
        chosen,
        Fixed(name_of(chosen.engine), chosen.block, carried, segment),
        reweighted,
    )


def _reasons(peak: int, budget: int, piece: float, pieces: bool, again: Fixed | None) -> Iterator[str]:
    if again is not None:
        yield "engine, block and pieces as chosen when this attribution began"
    if pieces:
        yield f"every sweep is a piece of about {piece:.1f} s, saved when it is finished"
    if peak > budget:
        yield f"the budget of {budget / 2**20:.1f} MiB is below what the smallest sweep needs"


def _free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        with open("/proc/meminfo") as file:
            available = next(line for line in file if line.startswith("MemAvailable"))
        return int(available.split()[1]) * 1024
    except (OSError, StopIteration):
        return 4 * 2**30  # no portable way to ask without another dependency
