"""A sweep rehearsed on a few recorded steps: what a step, a replay, a kept state and a loaded one really cost."""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar, final

import torch
from torch import Tensor

from hydragrad.hypergradient.allocations import Allocations
from hydragrad.hypergradient.choosing import Chosen
from hydragrad.hypergradient.costs import synchronize
from hydragrad.hypergradient.reverse import hessian_free_sweep, reverse_sweep, start
from hydragrad.hypergradient.scaled import ScaledEngine
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.trajectory.moments import Moment, advance
from hydragrad.trajectory.state import State, StepRecord

_Made = TypeVar("_Made")

STEPS, _FEWEST = 6, 3
"""Steps rehearsed; the first of them only warms up."""
_SHARE = 0.05
"""Part of the predicted time that a rehearsal may take; shorter sweeps are predicted from products alone."""


@final
@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of a sweep's parts.

    ``advance``: a replayed step; ``capture``: a state kept; ``load``: a state read from disk; ``step``: a step of the
    sweep whatever the queries; ``query``: for each query; ``work``: bytes that a step of one block needs for a while.
    """

    advance: float
    capture: float
    load: float
    step: float
    query: float
    work: int

    @staticmethod
    def of(chosen: Chosen) -> "Costs":
        """From products alone."""
        return Costs(chosen.replay, 0.0, 0.0, 0.0, chosen.per_query, chosen.block * chosen.sizes.engine)


def rehearse(sweep: Sweep, chosen: Chosen, queries: int, memory: int) -> Costs:
    """Sweep over the last steps before a checkpoint's successor with one block of queries, then with two.

    Skipped where it would take more than a twentieth of what it predicts, or more than half of ``memory`` bytes.
    """
    first = Costs.of(chosen)
    block = min(chosen.block, queries)
    narrow, wide = block, min(2 * block, queries)
    sizes = chosen.sizes
    needed = wide * sizes.adjoint + STEPS * sizes.state + first.work
    each = narrow + (wide if wide > narrow else 0)
    steps = min(STEPS, int(_SHARE * sweep.stop * queries / each) - 2)  # two more to count bytes
    if steps < _FEWEST or needed > memory // 2:
        return first
    key = ("rehearsed", repr(chosen.engine), block, wide, sweep.stop, sweep.objective.names, sweep.objective.mode)
    if key not in sweep.run.memo:
        sweep.run.memo[key] = _measured(sweep, chosen, narrow, wide, steps)
    return sweep.run.memo[key]


def _measured(sweep: Sweep, chosen: Chosen, narrow: int, wide: int, steps: int) -> Costs:
    state, records, load = _loaded(sweep, steps)
    replayer = sweep.replayer
    replayer.restore(state)
    advances, captures, moments = list[float](), list[float](), list[Moment]()
    for record in records:
        before, capture = _timed(replayer.state, replayer.device)
        gradient, taken = _timed(lambda record=record: advance(replayer, record, compare=False), replayer.device)
        batches, fetched = _timed(lambda record=record: replayer.batches(record, compare=False), replayer.device)
        advances.append(taken)
        captures.append(capture + fetched)
        moments.append(Moment(record, before, gradient, batches, replayer.random))
    rehearsal = _Rehearsal(sweep, chosen, moments)
    with sweep.objective.differentiable():
        one = rehearsal.seconds(narrow)
        two = rehearsal.seconds(wide) if wide > narrow else one
        work = rehearsal.bytes(narrow)
    query = max((two - one) / max(wide - narrow, 1), 0.5 * two / wide) if wide > narrow else one / narrow
    return Costs(
        advance=_typical(advances),
        capture=_typical(captures),
        load=load,
        step=max(two - wide * query, 0.0),
        query=query,
        work=max(work, 0 if work else narrow * chosen.sizes.engine),
    )


def _loaded(sweep: Sweep, steps: int) -> tuple[State, list[StepRecord], float]:
    """The latest state before steps of the usual size, those steps, and the seconds that reading a state takes."""
    trajectory = sweep.run.trajectory
    marks = [t for t in trajectory.checkpoints if t < sweep.stop]
    start = max(marks, key=lambda t: (min(steps, sweep.stop - t), len(trajectory.steps[t].batches[0]), t))
    began = time.perf_counter()
    state = trajectory.state(start)
    load = time.perf_counter() - began
    return state, list(trajectory.steps[start : min(start + steps, sweep.stop)]), load


@final
class _Rehearsal:
    """Sweeps over the same few moments."""

    def __init__(self, sweep: Sweep, chosen: Chosen, moments: list[Moment]) -> None:
        self._sweep, self._chosen, self._moments = sweep, chosen, moments

    def seconds(self, queries: int) -> float:
        """Of one step of a sweep that carries so many queries."""
        marks = list[float]()

        def watch(*_: object) -> None:
            synchronize(self._sweep.replayer.device)
            marks.append(time.perf_counter())

        self._run(queries, iter(self._moments[::-1]), watch)
        if len(marks) < 3:
            marks.clear()
            self._run(queries, iter(self._moments[::-1] * 3), watch)
        return _typical([b - a for a, b in itertools.pairwise(marks)], warm=False)

    def bytes(self, queries: int) -> int:
        """What a step of one block needs beside its moment and adjoints; 0 where it cannot be counted."""
        device = self._sweep.replayer.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
            made = self._run(queries, iter(self._moments[-1:]), lambda *_: None)
            return max(torch.cuda.max_memory_allocated(device) - before - made, 0)
        if "compiled" in repr(self._chosen.engine):
            return 0
        with Allocations() as counted:
            made = self._run(queries, iter(self._moments[-1:]), lambda *_: None)
        return max(counted.peak - made, 0)

    def _run(self, queries: int, moments: Iterator[Moment], watch: Callable[..., None]) -> int:
        """A sweep with adjoints of ones; their bytes."""
        sweep, engine = self._sweep, self._chosen.engine
        last = self._moments[-1]
        slots = sweep.optimizer.slots(last.record.groups)
        like = [last.state.params[name] for name in sweep.objective.names]
        ones = tuple(x.new_ones((queries, *x.shape)) for x in like)
        buffers = tuple(
            last.state.buffers[name].new_zeros((queries, *last.state.buffers[name].shape))
            for name in sweep.objective.carried
        )
        adjoint = start(ones, slots, buffers)
        scores = like[0].new_zeros(sweep.run.num_examples, queries)

        def sink(ids: Tensor, chosen: slice, terms: Tensor, _: int) -> None:
            terms = terms.flatten(2).sum(2) if terms.dim() > 2 else terms
            scores[:, chosen].index_add_(0, ids.to(scores.device), terms.T, alpha=-1)

        common = (adjoint, min(self._chosen.block, queries), sink, watch)
        if isinstance(engine, ScaledEngine):
            hessian_free_sweep(moments, sweep.objective, sweep.optimizer, engine, *common)
        else:
            reverse_sweep(moments, sweep.objective, sweep.optimizer, engine, *common)
        held = [*adjoint.lam, *adjoint.bet, *(x for slots in adjoint.sig for x in slots.values()), scores]
        return sum(x.nbytes for x in held)


def _timed(work: Callable[[], _Made], device: torch.device) -> tuple[_Made, float]:
    synchronize(device)
    began = time.perf_counter()
    made = work()
    synchronize(device)
    return made, time.perf_counter() - began


def _typical(seconds: list[float], *, warm: bool = True) -> float:
    """The median; ``warm``: without the first, which warms up."""
    return statistics.median(seconds[1:] if warm and len(seconds) > 1 else seconds)
