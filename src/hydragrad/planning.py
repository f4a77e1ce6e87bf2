"""Before the run: which engine, how many queries at a time, how much memory, how long."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn, final

import torch

from hydragrad.amounts import Amount, bytes_of, in_words
from hydragrad.arranging import Arrangement, Needs, arrange
from hydragrad.errors import UnsupportedError, message
from hydragrad.hypergradient.choosing import Chosen, Fixed, choose, fixed
from hydragrad.hypergradient.engines import check_method
from hydragrad.hypergradient.naming import name_of
from hydragrad.hypergradient.pages import kept_pages
from hydragrad.hypergradient.queries import length_of
from hydragrad.hypergradient.rehearsing import Costs, rehearse
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.run import Run
from hydragrad.smoothing import check_smoothing

PIECE_SECONDS = 60.0
"""What a piece of a resumable attribution should take at most; longer where its replay alone takes half of that."""


_ABOUT = 1.05
"""How far above a refusal's least memory a budget is still meant as an answer to it."""


@final
@dataclass(frozen=True)
class Plan:
    """What a sweep will do. ``str(plan)`` says it in words.

    ``engine``: the computation chosen; ``block``: queries per product; ``carried``: queries whose adjoints one sweep
    carries; ``sweeps``: passes over the run (over all reweighted runs together, of which there are
    ``reweighted``; 0: the recorded run itself); ``segment``: states kept in memory at a time, ``on_disk``: further ones
    of a stretch; ``replays``: how many times the whole run is replayed for that; ``peak_bytes``: memory above
    training's, the result included (and, of a sweep long enough to be rehearsed, what the heap holds beyond tensors);
    ``disk_bytes``: in a temporary folder; ``seconds``: predicted; ``budget``: bytes allowed; ``reasons``: why;
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
    replays: float = 1.0
    on_disk: int = 0
    disk_bytes: int = 0
    reweighted: int = 0

    @property
    def gradient_gap(self) -> float:
        return self.chosen.gradient_gap

    def __str__(self) -> str:
        runs = f" over {self.reweighted} reweighted run(s)" if self.reweighted else ""
        spilled = f" and {self.on_disk} on disk ({in_words(self.disk_bytes)})" if self.on_disk else ""
        return (
            f"{self.method}, {self.queries} queries: {self.engine}, {self.block} at a time, {self.sweeps} sweep(s) of "
            f"{self.carried}{runs}, {self.segment} states kept{spilled}, {self.replays:.2f} replays of the run; "
            f"about {self.peak_bytes / 2**20:.0f} MiB, {self.seconds:.1f} s"
            + "".join(f"; {reason}" for reason in self.reasons)
        )


def plan(
    run: Run,
    queries: Any,
    method: str = "exact",
    *,
    rows: int | None = None,
    step: int | None = None,
    memory: Amount | None = None,
    disk: Amount | None = None,
    replays: float | None = None,
    block: int | None = None,
    compile: bool | None = None,
    smoothing: int | None = None,
) -> Plan:
    """Predict memory and time of ``attribute`` and choose how to do it.

    ``queries``: their number, or the queries; ``memory``: budget above training's, in bytes or as "2 GB" (None: half
    of what is free); ``disk``: budget for states in a temporary folder below the run's (None: none are written);
    ``replays``: how many times the run may be replayed in all (None: any number, the fewest seconds count); ``block``:
    queries per product (None: measured); ``compile``: use torch.compile (None: where it pays); ``smoothing``: so
    many reweighted runs are swept in place of the recorded one.
    Runs the candidates for a moment on one recorded batch, and rehearses the sweep on a few. Raises UnsupportedError
    for budgets that are too small, with what would do. Example: ``print(hydragrad.plan(run, queries=1000))``.
    """
    check_smoothing(smoothing)
    count = queries if isinstance(queries, int) else length_of(queries)
    with kept_pages():  # as in the sweep, whose seconds are predicted
        return plan_sweep(
            Sweep.of(run, step),
            count,
            method,
            rows=rows,
            memory=memory,
            disk=disk,
            replays=replays,
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
    memory: Amount | None,
    disk: Amount | None = None,
    replays: float | None = None,
    block: int | None,
    compile: bool | None,
    pieces: bool = False,
    again: Fixed | None = None,
    reweighted: int = 0,
    forward: bool = False,
) -> Plan:
    """``plan`` for a sweep that is made ready already; in ``pieces`` of about a minute, or as chosen before.

    ``reweighted`` runs have no states on disk: each is replayed once more, and keeps states on the way.
    ``forward``: for the forward sweep.
    """
    for name, value in (("queries", queries), ("block", block), ("replays", replays)):
        if value is not None and not value >= 1:  # not so for NaN
            raise UnsupportedError(message(f"{name} is too small", expected="at least 1", got=value))
    check_method(method)
    budget = _free(sweep.replayer.device) // 2 if memory is None else bytes_of(memory, "memory")
    room = 0 if disk is None else bytes_of(disk, "disk")
    rows = sweep.run.num_examples if rows is None else rows
    # A refusal names the least memory with the engine it met: asked again with that much, it is the one meant.
    key = ("refused", method, queries, rows, reweighted, sweep.stop, sweep.objective.names)
    refused = None if again is not None or forward else sweep.run.memo.get(key)
    if refused is not None and refused[2] <= budget < _ABOUT * refused[2]:
        chosen, needs, _ = refused
    else:
        if again is None:
            chosen = choose(sweep, queries, method, memory=budget, block=block, compile=compile)
        else:
            chosen = fixed(sweep, method, again.engine, again.block)
        costs = Costs.of(chosen) if forward else rehearse(sweep, chosen, queries, budget)
        needs = Needs.of(sweep, chosen, costs, queries, rows, reweighted)
    if forward:
        needs = replace(needs, stretches=((1, sweep.stop),))  # every state is passed by, none is kept
    if again is None:
        arranged = arrange(needs, budget, 0 if reweighted else room, replays)
    else:
        arranged = Arrangement(again.carried, again.segment, again.on_disk)
    if pieces and again is None:
        replay = needs.replay_seconds(arranged)
        wanted = max(PIECE_SECONDS - replay, replay) / (sweep.stop * needs.costs.query)
        arranged = arranged.narrowed(queries, max(chosen.block, int(wanted)))
        made = fixed(sweep, method, name_of(chosen.engine), min(chosen.block, arranged.carried))
        chosen = replace(made, reasons=chosen.reasons)  # as a later call will make it
    if memory is not None and again is None and not forward and needs.bytes(arranged) > budget:
        sweep.run.memo[key] = chosen, needs, needs.bytes(arranged)
        _refuse(needs.bytes(arranged), budget)
    chosen = chosen.limited(arranged.carried)
    return _plan(method, needs, arranged, chosen, budget, pieces, again)


def _refuse(needed: int, budget: int) -> NoReturn:
    raise UnsupportedError(
        message(
            "memory is too small for any sweep",
            expected=f"at least {needed} bytes ({in_words(needed)}): one query at a time, two states kept",
            got=f"{budget} bytes",
            remedy="allow more memory, or ask fewer queries or rows (aggregate=, groups=, train=)",
        )
    )


def _plan(
    method: str,
    needs: Needs,
    arranged: Arrangement,
    chosen: Chosen,
    budget: int,
    pieces: bool,
    again: Fixed | None,
) -> Plan:
    """Everything as it is said."""
    sweeps = arranged.sweeps(needs.queries) * max(needs.reweighted, 1)
    peak, seconds = needs.bytes(arranged), needs.seconds(arranged)
    return Plan(
        method,
        needs.queries,
        repr(chosen.engine).strip("<>"),
        chosen.block,
        arranged.carried,
        sweeps,
        arranged.slots,
        peak,
        seconds,
        budget,
        (*chosen.reasons, *_reasons(needs, arranged, peak, budget, seconds / sweeps, pieces, again)),
        chosen,
        Fixed(name_of(chosen.engine), chosen.block, arranged.carried, arranged.slots, arranged.on_disk),
        needs.replays(arranged),
        arranged.on_disk,
        arranged.on_disk * needs.stored,
        needs.reweighted,
    )


def _reasons(
    needs: Needs, arranged: Arrangement, peak: int, budget: int, piece: float, pieces: bool, again: Fixed | None
) -> Iterator[str]:
    times = needs.times(arranged)
    if times > 1:
        yield f"too little memory to keep a state for every step: no step is taken more than {times} times a sweep"
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
