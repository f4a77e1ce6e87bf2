"""The small task trained again by a loop written out, over the recorded ids: what replay must give."""

from collections.abc import Sequence

import torch
from torch import Tensor

import hydragrad as hg
from tests.trajectory.loops import losses, sgd


def trained_again(
    task: hg.Task,
    run: hg.Run,
    ids: Sequence[int] = (),
    weight: float = 0.0,
    labels: Tensor | None = None,
    others: float = 1.0,
) -> torch.nn.Module:
    """The loop with the losses of ``ids`` at ``weight``, those of ``others`` at that, on other ``labels`` if given."""
    model = task.build()
    optimizer = sgd(model)
    points, given = task.train.tensors
    given = given if labels is None else labels
    for step in run.steps:
        batch = step.batches[0]
        optimizer.zero_grad()
        each = task.loss(model, (points[batch], given[batch]))
        weights = torch.where(torch.isin(batch, torch.tensor(list(ids), dtype=torch.int64)), weight, others)
        (each * weights).mean().backward()
        optimizer.step()
    return model


@torch.no_grad()
def test_losses(task: hg.Task, model: torch.nn.Module) -> Tensor:
    """The loss of every test example, float64."""
    return losses(model, task.test.tensors).double()


test_losses.__test__ = False  # type: ignore[attr-defined]


@torch.no_grad()
def right(model: torch.nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """1 where the prediction is the label."""
    return (model(batch[0]).argmax(1) == batch[1]).float()
