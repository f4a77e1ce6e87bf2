"""Signals from the states along the run: losses, losses under other labels, gradients of each example's own loss."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from tqdm import tqdm

from hydragrad.errors import MismatchError, message
from hydragrad.hypergradient.queries import Columns
from hydragrad.labels import Relabel
from hydragrad.retraining.measuring import queries_of
from hydragrad.run import Run, kept_random_state
from hydragrad.shapes import Float, Int, in_rows
from hydragrad.signals.probabilities import Scale
from hydragrad.signals.trying import LabelLosses, el2n
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
    losses = LabelLosses(run)
    return torch.stack([losses(state)[0] for state in _states(run, most)]).mean(0)


@final
@dataclass(frozen=True)
class Candidates:
    """Every label tried on every example in the states along the run, averaged over them.

    With p the model's probabilities as the losses show them (``scale``: how), and y the example's own label: ``loss``
    [N]: as trained; ``losses`` [N, C]: without the weights of classes; ``confidence`` [N, C]: p; ``el2n`` [N]:
    ||p - onehot(y)||; ``margin`` [N]: max over c != y of p_c, minus p_y; ``late`` [N]: 1 - p_y, averaged over the
    states in the second half of the run.
    """

    loss: Float[Tensor, " N"]
    losses: Float[Tensor, "N C"]
    confidence: Float[Tensor, "N C"]
    el2n: Float[Tensor, " N"]
    margin: Float[Tensor, " N"]
    late: Float[Tensor, " N"]
    scale: Scale


def candidate_labels(
    run: Run,
    classes: Sequence[int],
    given: Int[Tensor, " N"],
    relabel: Relabel,
    most: int = MOST,
    *,
    progress: bool = False,
) -> Candidates:
    """Try every label of ``classes`` on every training example: the model once, the loss C + 1 times a state.

    ``given``: the place of each example's own label among the classes.
    """
    tried = LabelLosses(run, classes, relabel)
    states, own = stored_along(run, most), given[:, None]
    latest = [step for step in states if 2 * step > states[-1]]
    total: list[Tensor] = []
    scale: Scale | None = None
    todo = states[::-1]  # the last first: there losses tell weights of classes best
    bar = tqdm(total=len(states), desc="trying labels", unit="state", delay=2, disable=not progress)
    while todo:
        step = todo.pop(0)
        loss, losses = tried(run.trajectory.state(step))
        if scale is None:
            scale = Scale.of(losses)
        elif scale.fits and not scale.holds(losses):  # what explained the losses so far does not explain these
            scale = Scale.of(losses) if scale.weights is None else Scale(None, False)
            todo, total = states[::-1], []
            bar.reset()
            continue
        bar.update()
        losses = scale.unweighted(losses)
        p = torch.softmax(-losses, 1)
        quality = p.gather(1, own)[:, 0]
        late = (1 - quality) * (len(states) / len(latest) if step in latest else 0)
        margin = p.scatter(1, own, -1.0).max(1).values - quality
        now = [x / len(states) for x in (loss, losses, p, el2n(p, given), margin, late)]
        total = now if not total else [sums + x for sums, x in zip(total, now, strict=True)]
    bar.close()
    assert scale is not None
    return Candidates(*total, scale=scale)


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
                    total[chosen] += in_rows(part).square().sum(1).cpu().to(total.dtype)
    return total / count


def _states(run: Run, most: int) -> Iterator[State]:
    return (run.trajectory.state(step) for step in stored_along(run, most))
