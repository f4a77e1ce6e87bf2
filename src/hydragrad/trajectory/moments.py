"""The recorded steps revisited, forwards or backwards, each with the state it started from."""

import contextlib
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from hydragrad.errors import MismatchError
from hydragrad.trajectory.agreement import state_difference, tolerance
from hydragrad.trajectory.explaining import explain_state
from hydragrad.trajectory.randomness import RandomState
from hydragrad.trajectory.replay import Replayer
from hydragrad.trajectory.reweighted import Reweighted
from hydragrad.trajectory.schedule import LEAST, Schedule, cut
from hydragrad.trajectory.spilling import Spill
from hydragrad.trajectory.state import State, StepRecord
from hydragrad.trajectory.store import Trajectory

Revisited = tuple[State, dict[str, Tensor], tuple[RandomState | None, ...]]
"""The state before a step, its gradient, the random states of its micro-batches."""


@final
@dataclass(frozen=True)
class Moment:
    """One step revisited: its record, the state before it, its gradient by parameter name, its batches.

    ``batches``: (ids, batch) of each micro-batch, then of each skipped batch that changed buffers (``record.passes``).
    ``gradient``: the raw one, before ``record.clips``; the optimizer saw it clipped (see step.clipping.Clipping).
    ``random``: the state from which each of them drew in the replay (None: nothing was drawn), for whoever must draw
    the same again. ``weights`` [N] of the examples' losses in this run (None: 1, as recorded).
    """

    record: StepRecord
    state: State
    gradient: dict[str, Tensor]
    batches: list[tuple[Tensor, Any]]
    random: tuple[RandomState | None, ...] = ()
    weights: Tensor | None = None


def advance(
    replayer: Replayer, record: StepRecord, weights: Tensor | None = None, *, compare: bool = True
) -> dict[str, Tensor]:
    """Take one step; its gradient by parameter name (absent: no gradient came), before it was clipped."""
    replayer.advance(record, weights, compare=compare)
    return {name: g for name, g in replayer.gradients().items() if name not in record.without_grad}


def batches_of(replayer: Replayer, record: StepRecord) -> list[tuple[Tensor, Any]]:
    """(ids, batch) of a step's micro-batches, then of the skipped ones that changed buffers; not compared."""
    return [*replayer.batches(record, compare=False), *replayer.passed(record, compare=False)]


def backwards(
    revisited: list[Revisited], replayer: Replayer, steps: Sequence[StepRecord], weights: Tensor | None = None
) -> Iterator[Moment]:
    """The moments of revisited steps, the last first, each forgotten when the next is asked for."""
    while revisited:
        before, gradient, random = revisited.pop()
        record = steps[before.step]
        yield Moment(record, before, gradient, batches_of(replayer, record), random, weights)
        del before, gradient


def forwards(replayer: Replayer, trajectory: Trajectory, stop: int) -> Iterator[Moment]:
    """The moments of steps 0 .. ``stop - 1``."""
    replayer.restore(trajectory.state(0))
    for record in trajectory.steps[:stop]:
        before = replayer.state()
        gradient = advance(replayer, record)
        yield Moment(record, before, gradient, batches_of(replayer, record), replayer.random)


@final
class Backwards:
    """Iterates over steps ``stop - 1 .. 0`` of the recorded run, or of a reweighted one, as Moments.

    Every stretch between two checkpoints is replayed forwards, then handed out backwards. At most ``slots`` states are
    kept at a time, beside the recorded one that the replay is compared with: longer stretches are cut by the rules of
    ``schedule``, which tells how often steps are taken, by states in memory and by ``on_disk`` states in a
    folder below the store, removed at the end.
    ``linear``: the optimizer's update is, so that its derivative reads no slot (momentum) and moments come without.
    ``drift``: step of a checkpoint -> how far the replay ended from it; ``replayed``: steps taken so far. A reweighted
    run's gradients have no record to be compared with; its batches have.

    A stretch that ends in the recorded state bit for bit had the recorded batches and gradients. Where one does not,
    it and all that follow are replayed with every batch and gradient compared, so that a refusal names the step; one
    that ends in no recorded state is compared likewise. Raises MismatchError for a recorded state that is not made by
    the steps before it, although their gradients are the recorded ones: something else changed it.
    """

    def __init__(
        self,
        replayer: Replayer,
        trajectory: Trajectory | Reweighted,
        stop: int,
        slots: int,
        on_disk: int = 0,
        *,
        linear: bool = False,
    ) -> None:
        self.replayer = replayer
        self.linear = linear
        self.trajectory = trajectory
        self.stop = stop
        self.schedule = Schedule(max(slots, LEAST), on_disk)
        self.drift: dict[int, float] = {}
        self.replayed = 0
        self._compare = False
        self._verified = False
        self._end: State | None = None
        """What the replay of the stretch at hand is compared with, until it has been."""

    def __iter__(self) -> Iterator[Moment]:
        return itertools.chain.from_iterable(self.stretches())

    def stretches(self) -> Iterator[Iterator[Moment]]:
        """The same, those together that one replay made: it is over when they come, and the next one waits for them."""
        marks = [t for t in self.trajectory.checkpoints if t < self.stop]
        following: State | None = None
        home = self.trajectory.folder if self.schedule.on_disk and isinstance(self.trajectory, Trajectory) else None
        with contextlib.nullcontext() if home is None else Spill(home) as spill:
            for start, stop in reversed(list(zip(marks, [*marks[1:], self.stop], strict=True))):
                if following is None and stop in self.trajectory.checkpoints:
                    following = self.trajectory.state(stop)
                self._end, following, self._verified = following, None, False
                pieces = self.schedule.pieces(stop - start)
                if spill is not None and len(pieces) > 1:
                    yield from self._spilled(start, pieces, spill)
                    continue
                state = self.trajectory.state(start)
                yield from self._stretch(state, stop)
                following = state
                del state

    def _spilled(self, start: int, pieces: list[int], spill: Spill) -> Iterator[Iterator[Moment]]:
        """A stretch in pieces: the states between them go to disk in a first pass, and are taken back in turn."""
        self.replayer.restore(self.trajectory.state(start))
        marks = list(itertools.accumulate(pieces, initial=start))
        for t in range(start, marks[-2]):
            self._advance(t, compare=self._compare)
            if t + 1 in marks[1:-2]:
                spill.write(self.replayer.state())
        for mark, stop in reversed(list(itertools.pairwise(marks))):
            if mark == marks[-2]:
                yield from self._stretch(self.replayer.state(), stop)
            else:
                yield from self._stretch(self.trajectory.state(start) if mark == start else spill.take(mark), stop)

    def _stretch(self, state: State, stop: int) -> Iterator[Iterator[Moment]]:
        """Steps ``stop - 1 .. state.step``: cut where they are too many, the later part first."""
        waiting: list[tuple[State, int]] = [(state, stop)]  # parts by their first state, the later ones on top
        while waiting:
            state, stop = waiting.pop()
            slots = self.schedule.slots - len(waiting)
            at_start = False
            while stop - state.step > slots:
                if not at_start:
                    self.replayer.restore(state)
                first = cut(stop - state.step, slots)
                for t in range(state.step, state.step + first):
                    self._advance(t, compare=self._compare)
                waiting.append((state, state.step + first))
                state, slots, at_start = self.replayer.state(), slots - 1, True
            yield self._part(state, stop)
            del state

    def _part(self, state: State, stop: int) -> Iterator[Moment]:
        """The steps of which every state is kept, once they are replayed."""
        end, self._end = self._end, None
        moments = self._replayed(state, stop, compare=self._compare or (end is None and not self._verified))
        del state
        if end is not None:
            self.drift[stop] = state_difference(end, self.replayer.state())
            self._verified = not self.drift[stop]
            if self.drift[stop] and not self._compare:
                self._compare = True
                first = moments[0][0]
                del moments  # before they are made again: twice as much would not fit
                self._compared(first.step)
                moments = self._replayed(first, stop, compare=True)
                del first
            self._refuse_meddling(end)
            del end
        return backwards(moments, self.replayer, self.trajectory.steps, self.trajectory.weights)

    def _refuse_meddling(self, end: State) -> None:
        """Equal gradients and another state, beyond rounding: something else than the recorded steps changed it.

        A reweighted run's states come from a replay, and its gradients have no record: there drift is no meddling.
        """
        limit = max(tolerance(param.dtype) for param in end.params.values())
        if self.drift[end.step] <= limit or not self.replayer.checks or self.trajectory.weights is not None:
            return
        since = self.trajectory.nearest(end.step - 1)
        if not any(since <= step < end.step for step in self.replayer.differences):
            raise MismatchError(explain_state(end, self.replayer.state(), since))

    def _compared(self, stop: int) -> None:
        """Go from the recorded state before ``stop`` up to it, comparing: what led astray may lie there."""
        start = self.trajectory.nearest(stop)
        self.replayer.restore(self.trajectory.state(start))
        for t in range(start, stop):
            self._advance(t, compare=True)

    def _replayed(self, state: State, stop: int, *, compare: bool) -> list[Revisited]:
        """The state before each step, its gradient, the random states of its micro-batches."""
        self.replayer.restore(state)
        moments: list[Revisited] = []
        for t in range(state.step, stop):
            first = t == state.step  # whole: it may be replayed from once more
            here = first and self.replayer.device.type == "cpu"
            before = state if here else self.replayer.state(slots=first or not self.linear)
            moments.append((before, self._advance(t, compare=compare), self.replayer.random))
        return moments

    def _advance(self, t: int, *, compare: bool) -> dict[str, Tensor]:
        self.replayed += 1
        return advance(self.replayer, self.trajectory.steps[t], self.trajectory.weights, compare=compare)
