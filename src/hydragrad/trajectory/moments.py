"""The recorded steps revisited, forwards or backwards, each with the state it started from."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from hydragrad.trajectory.agreement import state_difference
from hydragrad.trajectory.randomness import RandomState
from hydragrad.trajectory.replay import Replayer
from hydragrad.trajectory.reweighted import Reweighted
from hydragrad.trajectory.state import State, StepRecord
from hydragrad.trajectory.store import Trajectory

_Revisited = tuple[State, dict[str, Tensor], tuple[RandomState | None, ...]]


@final
@dataclass(frozen=True)
class Moment:
    """One step revisited: its record, the state before it, its gradient by parameter name, its micro-batches.

    ``gradient``: the raw one, before ``record.clips``; the optimizer saw it clipped (see step.clipping.Clipping).
    ``random``: the state from which each micro-batch drew in the replay (None: nothing was drawn), for whoever
    must draw the same again. ``weights`` [N] of the examples' losses in this run (None: 1, as recorded).
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
    raw = replayer.gradients() if replayer.raw is None else replayer.raw
    return {name: g for name, g in raw.items() if name not in record.without_grad}


def forwards(replayer: Replayer, trajectory: Trajectory, stop: int) -> Iterator[Moment]:
    """The moments of steps 0 .. ``stop - 1``."""
    replayer.restore(trajectory.state(0))
    for record in trajectory.steps[:stop]:
        before = replayer.state()
        gradient = advance(replayer, record)
        yield Moment(record, before, gradient, replayer.batches(record, compare=False), replayer.random)


@final
class Backwards:
    """Iterates over steps ``stop - 1 .. 0`` of the recorded run, or of a reweighted one, as Moments.

    Every stretch between two checkpoints is replayed forwards, then handed out backwards. At most about ``most``
    states are kept at a time: longer stretches are cut by states in memory, and replayed once more.
    ``drift``: step of a checkpoint -> how far the replay ended from it. A reweighted run's gradients have no record to
    be compared with; its batches have.

    A stretch that ends in the recorded state bit for bit had the recorded batches and gradients. Where one does not,
    it and all that follow are replayed with every batch and gradient compared, so that a refusal names the step.
    """

    def __init__(self, replayer: Replayer, trajectory: Trajectory | Reweighted, stop: int, most: int) -> None:
        self.replayer = replayer
        self.trajectory = trajectory
        self.stop = stop
        self.most = max(most, 2)
        self.drift: dict[int, float] = {}
        self.replayed = 0
        self._compare = False

    def __iter__(self) -> Iterator[Moment]:
        marks = [t for t in self.trajectory.checkpoints if t < self.stop]
        end: State | None = None
        for start, stop in reversed(list(zip(marks, [*marks[1:], self.stop], strict=True))):
            if end is None and stop in self.trajectory.checkpoints:
                end = self.trajectory.state(stop)
            state = self.trajectory.state(start)
            yield from self._stretch(state, stop, end)
            end = state

    def _stretch(self, state: State, stop: int, end: State | None) -> Iterator[Moment]:
        length = stop - state.step
        if length <= self.most:
            yield from self._short(state, stop, end)
            return
        piece = max(self.most, -(-length // self.most))
        cuts = [state]
        self.replayer.restore(state)
        for t in range(state.step, state.step + (length - 1) // piece * piece):
            self._advance(t, compare=self._compare)
            if (self.replayer.step - state.step) % piece == 0:
                cuts.append(self.replayer.state())
        for cut in reversed(cuts):
            yield from self._stretch(cut, min(cut.step + piece, stop), end if cut is cuts[-1] else None)

    def _short(self, state: State, stop: int, end: State | None) -> Iterator[Moment]:
        moments = self._replayed(state, stop, compare=self._compare or end is None)
        if end is not None:
            self.drift[stop] = state_difference(end, self.replayer.state())
            if self.drift[stop] and not self._compare:
                self._compare = True
                self._compared(state.step)
                moments = self._replayed(state, stop, compare=True)
        while moments:
            before, gradient, random = moments.pop()
            record = self.trajectory.steps[before.step]
            batches = self.replayer.batches(record, compare=False)
            yield Moment(record, before, gradient, batches, random, self.trajectory.weights)

    def _compared(self, stop: int) -> None:
        """Go from the recorded state before ``stop`` up to it, comparing: what led astray may lie there."""
        start = self.trajectory.nearest(stop)
        self.replayer.restore(self.trajectory.state(start))
        for t in range(start, stop):
            self._advance(t, compare=True)

    def _replayed(self, state: State, stop: int, *, compare: bool) -> list[_Revisited]:
        """The state before each step, its gradient, the random states of its micro-batches."""
        self.replayer.restore(state)
        moments: list[_Revisited] = []
        for t in range(state.step, stop):
            before = state if t == state.step else self.replayer.state()
            moments.append((before, self._advance(t, compare=compare), self.replayer.random))
        return moments

    def _advance(self, t: int, *, compare: bool) -> dict[str, Tensor]:
        self.replayed += 1
        return advance(self.replayer, self.trajectory.steps[t], self.trajectory.weights, compare=compare)
