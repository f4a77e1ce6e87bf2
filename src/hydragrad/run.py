"""A recorded run bound to the user's live model, loss and data."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from hydragrad.errors import MismatchError, message
from hydragrad.problem import Coefficients, Loss, Penalty, Problem, Reduction
from hydragrad.trajectory.binding import check_data, check_model, choose_collate, choose_reduction
from hydragrad.trajectory.ending import refuse_moved_on
from hydragrad.trajectory.finite import check_finite
from hydragrad.trajectory.hidden import Glance, refuse_hidden_state
from hydragrad.trajectory.ordering import LOOKED_AT
from hydragrad.trajectory.randomness import undisturbed
from hydragrad.trajectory.replay import Replayer, check_weights
from hydragrad.trajectory.reweighted import first_touched
from hydragrad.trajectory.state import State, StepRecord
from hydragrad.trajectory.store import Trajectory
from hydragrad.trajectory.watching import unwrapped


def load(
    path: str | Path,
    *,
    model: nn.Module,
    loss: Loss,
    data: Any,
    reduction: str | Coefficients | Reduction | None = None,
    collate_fn: Callable[[Any], Any] | None = None,
    penalty: Penalty | None = None,
) -> "Run":
    """Open a recorded run and bind it to the live model, per-example loss ([b] or [b, L]) and training data.

    ``reduction``: "mean", "sum" or (batch, shape) -> coefficients; None: as recorded, else "mean".
    ``penalty``: penalty(model) -> [], added once a step (to its first micro-batch) and not scaled by example weights.
    The model's current values do not matter and stay as they are. The first recorded step is taken once on a copy and
    compared. Raises StoreError (broken files), MismatchError (naming the difference), UnsupportedError (an unknown
    optimizer, a model that keeps state in plain attributes).
    Example: ``run = hydragrad.load("runs/mnist", model=model, loss=loss, data=train_set)``.
    """
    trajectory, model = Trajectory(path), unwrapped(model)
    check_model(model, trajectory.manifest)
    check_data(data, trajectory.manifest, tuple(trajectory.steps))
    collate = choose_collate(collate_fn, trajectory.manifest)
    problem = Problem(model, loss, data, choose_reduction(reduction, trajectory.manifest), collate, penalty)
    run = Run(problem, trajectory)
    if trajectory.steps:
        with kept_random_state():
            replayer = run.replayer(check=True)
            if trajectory.keeps_batches:
                replayer.look_at_order(trajectory.steps[:LOOKED_AT])
            before = Glance(replayer.module)
            replayer.advance(trajectory.steps[0])
            if before != Glance(replayer.module):
                refuse_hidden_state(run.replayer(check=False), trajectory.state(0), trajectory.steps[0])
    return run


def kept_random_state() -> Any:
    """A context that leaves the random states of torch, numpy and Python as it found them."""
    return undisturbed()


@final
class Run:
    """A recorded run and the live objects it was made of; made by ``load``.

    Example: ``run.replay(weights=w).params`` is what training would have given with those weights.
    """

    def __init__(self, problem: Problem, trajectory: Trajectory) -> None:
        self.problem, self.trajectory = problem, trajectory
        self.memo: dict[Any, Any] = {}
        """What sweeps keep from one call to the next: traced and compiled graphs. Never results."""

    @property
    def steps(self) -> Sequence[StepRecord]:
        """The recorded steps, 0..T-1."""
        return self.trajectory.steps

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.trajectory.steps)

    @property
    def num_examples(self) -> int:
        """N."""
        return len(self.problem.data)

    @property
    def half_precision(self) -> torch.dtype | None:
        """The dtype of the autocast that steps ran under (of the first that did); None: all ran in full precision."""
        casts = (cast for step in self.steps for cast in step.autocast if cast is not None)
        return next((getattr(torch, cast.dtype) for cast in casts), None)

    def __repr__(self) -> str:
        return f"Run({self.num_steps} steps, {self.num_examples} examples, {self.trajectory!r})"

    def replayer(self, *, check: bool = True) -> Replayer:
        """A fresh Replayer, standing at step 0."""
        replayer = Replayer(self.problem, self.trajectory, check=check)
        replayer.restore(self.trajectory.state(0))
        return replayer

    def replay(self, weights: Tensor | None = None, until: int | None = None) -> State:
        """The state before step ``until`` (None: the end) of the same training with these weights.

        ``weights`` [N]: 1 = as trained, 0 = removed (its loss counts nothing; batches and denominators stay). Without
        weights every step is compared with the record. Raises MismatchError, NonFiniteError (naming the first step and
        tensor that are not finite), UnsupportedError for the end of a run whose buffers changed after its last step.
        """
        if until is None:
            refuse_moved_on(self.trajectory)
        stop = self._checked_step(self.num_steps if until is None else until)
        replayer = self.replayer(check=True)
        if weights is not None:
            weights = check_weights(weights, self.num_examples).to(replayer.device)
            replayer.restore(self.trajectory.state(self.trajectory.nearest(first_touched(self.steps[:stop], weights))))
            weights = weights.cpu()
        with kept_random_state():
            for step in self.steps[replayer.step : stop]:
                replayer.advance(step, weights)
            state = replayer.state()
            check_finite(state, replayer, self.trajectory, weights)
        return state

    def states(self, start: int, stop: int) -> Iterator[State]:
        """The states before steps ``start`` .. ``stop - 1`` of the recorded run, from the nearest checkpoint on."""
        self._checked_step(start)
        self._checked_step(stop - 1) if stop > start else None
        replayer = self.replayer(check=False)
        replayer.restore(self.trajectory.state(self.trajectory.nearest(start)))
        for index in range(replayer.step, stop):
            if index >= start:
                yield replayer.state()
            if index + 1 < stop:
                with kept_random_state():
                    replayer.advance(self.steps[index])

    def _checked_step(self, step: int) -> int:
        if not 0 <= step <= self.num_steps:
            raise MismatchError(
                message("no such step", expected=f"0 to {self.num_steps}", got=step, cause="the run ended before it")
            )
        return step
