"""A sweep rehearsed on a few recorded steps: what a step, a replay, a kept state and a loaded one really cost."""

import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor

from hydragrad.hypergradient.allocations import Allocations
from hydragrad.hypergradient.choosing import Chosen
from hydragrad.hypergradient.clock import quiet_seconds
from hydragrad.hypergradient.costs import synchronize
from hydragrad.hypergradient.finite import FirstBad
from hydragrad.hypergradient.reverse import Adjoint, Direction, hessian_free_sweep, reverse_sweep, start
from hydragrad.hypergradient.scaled import ScaledEngine
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.watch import looked_at_always
from hydragrad.trajectory.moments import Revisited, advance, backwards

STEPS, FEWEST = 16, 3
"""Steps rehearsed at a time, and the fewest that are worth it."""
ROUNDS = 16
"""How often at most, parts in turns, so that a moment in which the machine is slow spoils a few laps of each."""
SETTLED, OWN, SMALL = 4, 8 * 2**20, 64 * 2**20
"""Passes after which a heap is about as torn as it gets; bytes by which the interpreter alone may grow meanwhile; and
of a sweep that is too small for its heap to matter."""
SHARE, LONGEST = 0.05, 3.0
"""Part of the predicted time that a rehearsal may take, and seconds; shorter sweeps are predicted from products."""


@final
@dataclass(frozen=True)
class Costs:
    """Seconds and bytes of a sweep's parts.

    ``advance``: a replayed step; ``capture``: a state kept; ``load``: a state read from disk; ``step``: a step of the
    sweep whatever the queries; ``query``: for each query; ``work``: bytes that a step of one block needs for a while;
    ``alone``: of a single query.
    """

    advance: float
    capture: float
    load: float
    step: float
    query: float
    work: int
    alone: int

    @staticmethod
    def of(chosen: Chosen) -> "Costs":
        """From products alone."""
        each = chosen.sizes.engine
        return Costs(chosen.replay, 0.0, 0.0, 0.0, chosen.per_query, chosen.block * each, each)


def rehearse(sweep: Sweep, chosen: Chosen, queries: int, memory: int) -> Costs:
    """Sweep over the last steps before a checkpoint's successor with one block of queries, then with two.

    Skipped where it would take more than a twentieth of what it predicts; where it would take more than half of
    ``memory`` bytes, only bytes are counted: of a block where that fits, of a single query where ``memory`` is too
    small for a block with every state.
    """
    first, sizes = Costs.of(chosen), chosen.sizes
    block = min(chosen.block, queries)
    narrow, wide = block, min(2 * block, queries)
    room = (memory // 2 - wide * sizes.adjoint - first.work) // sizes.state
    turns = SHARE * sweep.stop * queries / 2  # one in two only warms up
    steps = min(STEPS, int(turns / (narrow + (wide if wide > narrow else 0))) - 2, room)
    if turns < narrow:
        return first
    needed = sizes.made + block * sizes.adjoint + first.work + sizes.longest * sizes.state
    tight = needed > memory
    fits = narrow * sizes.adjoint + first.work + sizes.state <= memory
    counts = ((narrow,) if fits else ()) + ((1,) if tight else ())
    key = ("rehearsed", repr(chosen.engine), counts, wide, steps, sweep.stop, sweep.objective.names)
    key = (*key, sweep.objective.mode)
    if key not in sweep.run.memo:
        rehearsal = Rehearsal(sweep, chosen, max(steps, 1), room, quiet_seconds)
        seconds = min(SHARE * sweep.stop * (first.advance + queries * first.query), LONGEST)
        known = rehearsal.counted(first, counts, seconds if needed > SMALL else 0.0)
        if steps >= FEWEST:
            known = rehearsal.timed(known, narrow, wide, seconds)
        sweep.run.memo[key] = known
    return sweep.run.memo[key]


@final
@dataclass(frozen=True)
class _Laps:
    """Seconds of single steps: taken, captured before, gone back with one block of queries, and with two."""

    advance: list[float] = field(default_factory=list)
    capture: list[float] = field(default_factory=list)
    narrow: list[float] = field(default_factory=list)
    wide: list[float] = field(default_factory=list)


@final
class Rehearsal:
    """A sweep over the same few recorded steps again and again; ``clock`` tells how long its parts take.

    ``room``: states that there is memory for.
    """

    def __init__(self, sweep: Sweep, chosen: Chosen, steps: int, room: int, clock: Callable[[], float]) -> None:
        self._sweep, self._chosen, self._clock = sweep, chosen, clock
        trajectory = sweep.run.trajectory
        marks = [t for t in trajectory.checkpoints if t < sweep.stop]
        # the latest state before steps of the usual size
        first = max(marks, key=lambda t: (min(steps, sweep.stop - t), len(trajectory.steps[t].batches[0]), t))
        began = clock()
        self._state = trajectory.state(first)
        self._load = max(clock() - began, 0.0)
        self._stop = min(first + steps, sweep.stop)
        following = next(t for t in (*marks, sweep.stop) if t > first)
        self._whole = max(self._stop, min(following, first + room))

    def counted(self, known: Costs, counts: Sequence[int], seconds: float) -> Costs:
        """With the bytes of a step that carries so many queries: a block, one, or both.

        ``seconds``: for the heap of each; 0: what tensors take alone.
        """
        block = self._chosen.block
        found = {queries: self._bytes(queries, seconds) for queries in counts}
        if not all(found.values()):
            return known
        alone = found.get(1, max(-(-found[counts[0]] // block), min(found[counts[0]], known.alone)))
        return replace(known, work=found.get(block, block * alone), alone=alone)

    def timed(self, known: Costs, narrow: int, wide: int, seconds: float) -> Costs:
        """With the seconds of sweeps that carry so many queries, from two rounds at least, as many as take ``seconds``.

        Parts take turns, and each costs the median of its laps; a round before only warms up.
        """
        self._round(narrow, wide, _Laps())
        laps, until = _Laps(), time.perf_counter() + seconds
        for done in range(ROUNDS):
            if done >= 2 and time.perf_counter() > until:
                break
            self._round(narrow, wide, laps)
        one = _typical(laps.narrow)
        two = _typical(laps.wide) if wide > narrow else one
        query = max((two - one) / (wide - narrow), 0.5 * two / wide) if wide > narrow else one / narrow
        return replace(
            known,
            advance=_typical(laps.advance),
            capture=_typical(laps.capture),
            load=self._load,
            step=max(two - wide * query, 0.0),
            query=query,
        )

    def _round(self, narrow: int, wide: int, laps: _Laps) -> None:
        self._back(self._forth(laps), narrow, laps.narrow)
        if wide > narrow:
            self._back(self._forth(laps), wide, laps.wide)

    def _forth(self, laps: _Laps, stop: int | None = None) -> list[Revisited]:
        """The steps taken (None: those rehearsed), with the states and gradients that a sweep keeps."""
        replayer, moments = self._sweep.replayer, list[Revisited]()
        replayer.restore(self._state)
        for record in self._sweep.run.trajectory.steps[self._state.step : stop or self._stop]:
            at = [self._now()]
            before = replayer.state(slots=not self._sweep.optimizer.update.linear)
            at.append(self._now())
            moments.append((before, advance(replayer, record, compare=False), replayer.random))
            at.append(self._now())
            laps.capture.append(at[1] - at[0])
            laps.advance.append(at[2] - at[1])
        return moments

    def _back(self, moments: list[Revisited], queries: int, laps: list[float]) -> int:
        """A sweep back over ``moments``, with adjoints of ones; the bytes that it holds from step to step."""
        sweep, engine = self._sweep, self._chosen.engine
        last = moments[-1][0]
        like = [last.params[name] for name in sweep.objective.names]
        ones = tuple(x.new_ones((queries, *x.shape)) for x in like)
        scores = like[0].new_zeros(sweep.run.num_examples, queries)
        bad, marks = FirstBad(sweep.objective.names), list[float]()
        revisited = backwards(moments, self._sweep.replayer, sweep.run.steps)

        def sink(ids: Tensor, chosen: slice, terms: Tensor, _: int) -> None:
            terms = terms.flatten(2).sum(2) if terms.dim() > 2 else terms
            scores[:, chosen].index_add_(0, ids.to(scores.device), terms.T, alpha=-1)

        def watch(step: int, at: Adjoint | Direction) -> None:
            if looked_at_always(at):
                bad.see(step, at.parts())
            marks.append(self._now())

        common = (min(self._chosen.block, queries), sink, watch)
        if isinstance(engine, ScaledEngine):
            held = [*ones, scores]
            hessian_free_sweep([revisited], sweep.objective, sweep.optimizer, engine, ones, sweep.slots, *common)
        else:
            buffers = (last.buffers[name] for name in sweep.objective.carried)
            adjoint = start(ones, sweep.slots, tuple(x.new_zeros((queries, *x.shape)) for x in buffers))
            held = [*adjoint.lam, *adjoint.bet, *(x for slots in adjoint.sig for x in slots.values()), scores]
            reverse_sweep([revisited], sweep.objective, sweep.optimizer, engine, adjoint, *common)
        laps.extend(b - a for a, b in itertools.pairwise(marks))
        return sum(x.nbytes for x in held)

    def _bytes(self, queries: int, seconds: float) -> int:
        """What a step needs beside its moment, its adjoints and what the engine holds; 0 where it cannot be counted."""
        device, chosen = self._sweep.replayer.device, self._chosen
        if device.type != "cuda" and "compiled" in repr(chosen.engine):
            return 0
        with self._sweep.objective.differentiable():
            moments = self._forth(_Laps())[-1:]
            self._back(moments[:], queries, [])  # what is made once (a traced graph) is no step's work
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
                before = torch.cuda.memory_allocated(device)
                held = self._back(moments, queries, [])
                peak = torch.cuda.max_memory_allocated(device) - before
            else:
                with Allocations() as counted:
                    held = self._back(moments, queries, [])
                peak = counted.peak + (self._torn(queries, seconds) if seconds else 0)
        return max(peak - held - chosen.held, 0)

    def _torn(self, queries: int, seconds: float) -> int:
        """Resident memory beyond what operations hold: pieces of the heap too small for the next tensor, workspaces."""
        until, steps = time.perf_counter() + seconds, self._stop - self._state.step
        with Allocations() as counted:
            for _ in range(SETTLED):
                moments = self._forth(_Laps(), self._whole)  # states that stay tear most, as many as a sweep keeps
                self._back(moments[-steps:], queries, [])
                del moments
                if time.perf_counter() > until:
                    break
        torn = counted.risen - counted.peak
        return torn if torn > OWN else 0

    def _now(self) -> float:
        synchronize(self._sweep.replayer.device)
        return self._clock()


def _typical(laps: list[float]) -> float:
    """Their median; a lap that the clock's correction makes shorter than nothing is none."""
    return max(statistics.median(laps), 0.0)
