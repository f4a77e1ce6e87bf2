"""The model that would have been trained: the recorded steps again, with some examples changed."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from hydragrad.errors import HydragradError, MismatchError, UnsupportedError, message
from hydragrad.problem import Problem
from hydragrad.run import Run, kept_random_state
from hydragrad.trajectory.digests import batch_digests, describe_batch
from hydragrad.trajectory.state import State


@final
@dataclass(frozen=True)
class Change:
    """What is otherwise than in the recorded run.

    The losses of the examples ``ids`` weigh ``weight`` (0: removed), those of all others ``others``; or, with
    ``samples``, these samples stand in their places at full weight. No ids: as trained.
    """

    ids: tuple[int, ...] = ()
    weight: float = 0.0
    samples: tuple[Any, ...] | None = None
    others: float = 1.0

    def weights(self, count: int) -> torch.Tensor:
        """One weight an example, float64 [N]."""
        weights = torch.full((count,), self.others, dtype=torch.float64)
        if self.samples is None:
            weights[list(self.ids)] = self.weight
        return weights

    def describe(self, problem: Problem) -> dict[str, Any]:
        """Plain values that tell this change from others."""
        samples = None
        if self.samples is not None:
            samples = batch_digests(problem.collate(list(self.samples)), len(self.samples)).tolist()
        others = {} if self.others == 1.0 else {"others": self.others}
        return {"ids": list(self.ids), "weight": self.weight, "samples": samples, **others}


def retrained(run: Run, change: Change, until: int, *, early: bool = True) -> State:
    """The state before step ``until`` of the same training under ``change``.

    ``early``: begin at the last checkpoint before the first step that the change touches; right where replay gives
    the record's own bits. Otherwise from step 0. Raises MismatchError, NonFiniteError.
    """
    if not change.ids:
        return run.replay(until=until)
    weights = change.weights(run.num_examples)
    if change.samples is None and early:
        return run.replay(weights=weights, until=until)
    original = run.replayer(check=True)
    replayer = _bound(run, change).replayer(check=False)
    replayer.restore(run.trajectory.state(first_replayed(run, change, until) if early else 0))
    with kept_random_state():
        for step in run.steps[replayer.step : until]:
            original.batches(step)  # the data that was not changed on purpose is the recorded one
            with _trainable(change):
                replayer.advance(step, weights)
    return replayer.state()


@contextlib.contextmanager
def _trainable(change: Change) -> Iterator[None]:
    """Turn an error of the user's code on samples that were given into a MismatchError that names them."""
    try:
        yield
    except (HydragradError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        if change.samples is None:
            raise
        raise MismatchError(
            message(
                f"the training cannot take what is given in place of the examples {list(change.ids)[:5]}",
                expected="labels that the model knows, samples as in the training data",
                got=f"{type(error).__name__}: {str(error)[:300]}",
            )
        ) from error


def first_replayed(run: Run, change: Change, until: int) -> int:
    """The checkpoint from which a change has to be replayed."""
    touched = torch.full((run.num_examples,), change.others != 1.0)
    touched[list(change.ids)] = True
    first = next((s.index for s in run.steps[:until] if any(bool(touched[ids].any()) for ids in s.batches)), until)
    return run.trajectory.nearest(first) if change.ids else 0


def _bound(run: Run, change: Change) -> Run:
    """The run with the changed data in place of the recorded."""
    if change.samples is None:
        return run
    if run.trajectory.manifest.collate["mode"] == "indices":
        raise UnsupportedError(
            message(
                "single samples cannot be replaced",
                expected="a recorded loader that collates samples",
                got="a loader with batch_size=None, whose data set is asked for many ids at once",
                remedy="remove examples instead, or load the run with a data set that holds the other samples",
            )
        )
    changed = _Replaced(run.problem.data, dict(zip(change.ids, change.samples, strict=True)))
    for place in change.ids:
        _check_form(run.problem, run.problem.data[place], changed[place], place)
    return Run(replace(run.problem, data=changed), run.trajectory)


def _check_form(problem: Problem, before: Any, after: Any, place: int) -> None:
    try:
        forms = [describe_batch(problem.collate([sample])) for sample in (before, after)]
    except (TypeError, ValueError, RuntimeError) as error:
        raise MismatchError(message(f"the new sample {place} cannot be collated", got=str(error))) from error
    if forms[0] != forms[1]:
        raise MismatchError(
            message(
                f"the new sample {place} has another form than the old one",
                expected=forms[0],
                got=forms[1],
                remedy="give samples of the same parts, types and shapes as in the training data",
            )
        )


@final
class _Replaced:
    """A data set with other samples in a few places."""

    def __init__(self, data: Any, samples: dict[int, Any]) -> None:
        self._data, self._samples = data, samples

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: int) -> Any:
        return self._samples[place] if place in self._samples else self._data[place]

    def __iter__(self) -> Iterator[Any]:
        return (self[place] for place in range(len(self)))
