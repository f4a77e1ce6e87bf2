"""Signals from the states along the run: losses, losses under other labels, gradients of each example's own loss."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from tqdm import tqdm

from hydragrad.errors import MismatchError, message
from hydragrad.hypergradient.queries import Columns
from hydragrad.labels import Relabel
from hydragrad.retraining.measuring import queries_of
from hydragrad.run import Run, kept_random_state
from hydragrad.shapes import Float, Int
from hydragrad.trajectory.state import State

MOST = 20
"""States looked at; more checkpoints than these are thinned evenly."""
_GRADIENTS = 64
"""Examples whose gradients are held at a time."""


def stored_along(run: Run, most: int = MOST) -> list[int]:
    """The stored steps, the untrained one left out, at most ``most``, evenly spread and with the last."""
    stored = [step for step in run.trajectory.checkpoints if step > 0]
    if not stored:
        raise MismatchError(
            message(
                "the run stored no state after its first",
                cause="it was stopped before its first checkpoint",
                remedy="record it again, with a smaller checkpoint_every",
            )
        )
    places = torch.linspace(0, len(stored) - 1, min(most, len(stored))) if most > 1 else torch.tensor([len(stored) - 1])
    return [stored[place] for place in places.round().int().unique().tolist()]


def mean_losses(run: Run, most: int = MOST) -> Float[Tensor, " N"]:
    """Each training example's loss in evaluation mode, averaged along the run: wrong labels are learnt last."""
    queries = queries_of(run, run.problem.data)
    return torch.stack([queries.values(state) for state in _states(run, most)]).mean(0).cpu()


@final
@dataclass(frozen=True)
class Candidates:
    """Every label tried on every example in the states along the run, averaged over them.

    With p the softmax over the labels of minus the losses and y the example's own label: ``losses`` [N, C];
    ``confidence`` [N, C]: p; ``el2n`` [N]: ||p - onehot(y)||; ``margin`` [N]: max over c != y of p_c, minus p_y.
    """

    losses: Float[Tensor, "N C"]
    confidence: Float[Tensor, "N C"]
    el2n: Float[Tensor, " N"]
    margin: Float[Tensor, " N"]


def candidate_labels(
    run: Run,
    classes: Sequence[int],
    given: Int[Tensor, " N"],
    relabel: Relabel,
    most: int = MOST,
    *,
    progress: bool = False,
) -> Candidates:
    """Try every label of ``classes`` on every training example: C losses an example and state.

    ``given``: the place of each example's own label among the classes.
    """
    tried = label_losses(run, run.problem.data, classes, relabel)
    states = stored_along(run, most)
    own = given[:, None]
    total = [torch.zeros(run.num_examples, len(classes)) for _ in range(2)]
    total += [torch.zeros(run.num_examples) for _ in range(2)]
    for step in tqdm(states, desc="trying labels", unit="state", delay=2, disable=not progress):
        losses = tried(run.trajectory.state(step))
        p = torch.softmax(-losses, 1)
        el2n = p.scatter_add(1, own, -torch.ones_like(own, dtype=p.dtype)).norm(dim=1)
        margin = p.scatter(1, own, -1.0).max(1).values - p.gather(1, own)[:, 0]
        for sums, now in zip(total, (losses, p, el2n, margin), strict=True):
            sums += now / len(states)
    return Candidates(*total)


def label_losses(
    run: Run, data: Any, classes: Sequence[int], relabel: Relabel
) -> Callable[[State], Float[Tensor, "n C"]]:
    """What gives, of a state, the loss of every example of ``data`` [n] with every label of ``classes`` [C]."""
    asked = [queries_of(run, _Relabelled(data, label, relabel)) for label in classes]
    return lambda state: torch.stack([queries.values(state).cpu().float() for queries in asked], dim=1)


def self_influence(run: Run, most: int = MOST) -> Float[Tensor, " N"]:
    """``||grad loss_i||^2`` averaged along the run: what one SGD step on an example does to its own loss (TracIn)."""
    queries = queries_of(run, run.problem.data)
    columns = Columns.make(None, queries.count)
    total, count = torch.zeros(queries.count), 0
    for state in _states(run, most):
        count += 1
        with kept_random_state():
            for first in range(0, queries.count, _GRADIENTS):
                chosen = slice(first, min(first + _GRADIENTS, queries.count))
                for part in queries.sensitivities(state, columns, chosen)[0]:
                    total[chosen] += part.flatten(1).square().sum(1).cpu().to(total.dtype)
    return total / count


def _states(run: Run, most: int) -> Iterator[State]:
    return (run.trajectory.state(step) for step in stored_along(run, most))


@final
class _Relabelled:
    """The data with one label everywhere."""

    def __init__(self, data: Any, label: int, relabel: Relabel) -> None:
        self._data, self._label, self._relabel = data, label, relabel

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: int) -> Any:
        return self._relabel(self._data[place], self._label)
