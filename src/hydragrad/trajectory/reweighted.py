"""The run as it would have gone with other weights of its examples: what a sweep there goes back along."""

from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from hydragrad.trajectory.finite import check_finite
from hydragrad.trajectory.replay import Replayer
from hydragrad.trajectory.state import State, StepRecord
from hydragrad.trajectory.store import Trajectory


def first_touched(steps: Sequence[StepRecord], weights: Tensor) -> int:
    """The first step in which an example's weight is not 1: all before it is as recorded. None: their number."""
    changed = (weights != 1).cpu()
    for record in steps:
        if any(bool(changed[ids].any()) for ids in record.batches):
            return record.index
    return len(steps)


def seen(steps: Sequence[StepRecord], count: int) -> Tensor:
    """Which of ``count`` examples take part in these steps, bool [N]."""
    found = torch.zeros(count, dtype=torch.bool)
    for record in steps:
        for ids in record.batches:
            found[ids] = True
    return found


@final
class Reweighted:
    """Steps 0 .. ``stop - 1`` of a recorded run, taken with ``weights`` [N] (1: as trained, 0: removed).

    Made by one replay, batches compared with the record, which keeps its end and at most ``most`` states on the way.
    Has the face of a Trajectory: ``steps``, ``checkpoints``, ``state(t)``, ``nearest(t)``. The states before the first
    step that the weights touch are the recorded ones. ``watch()`` is called at every step taken.
    Raises MismatchError, NonFiniteError.
    """

    def __init__(
        self,
        replayer: Replayer,
        trajectory: Trajectory,
        weights: Tensor,
        stop: int,
        most: int,
        watch: Callable[[], object] = lambda: None,
    ) -> None:
        self.steps = trajectory.steps
        self.weights = weights.cpu()
        start = trajectory.nearest(first_touched(trajectory.steps[:stop], self.weights))
        self._recorded = trajectory
        self._kept: dict[int, State] = {}
        self.checkpoints: tuple[int, ...] = tuple(t for t in trajectory.checkpoints if t <= start)
        every = max(most, -(-(stop - start) // most))
        replayer.restore(trajectory.state(start))
        for record in trajectory.steps[start:stop]:
            replayer.advance(record, self.weights)
            watch()
            if (record.index + 1 - start) % every == 0 or record.index + 1 == stop:
                self._kept[record.index + 1] = replayer.state()
        if start == stop:
            self._kept[stop] = replayer.state()
        self.checkpoints += tuple(t for t in self._kept if t not in self.checkpoints)
        check_finite(self._kept[stop], replayer, trajectory, self.weights)

    def state(self, step: int) -> State:
        """The state before one of ``checkpoints``."""
        return self._kept[step] if step in self._kept else self._recorded.state(step)

    def nearest(self, step: int) -> int:
        """The last of ``checkpoints`` at or before ``step``."""
        return max(kept for kept in self.checkpoints if kept <= step)
