"""From a moment of the trajectory to the points at which engines differentiate."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hydragrad.step.objective import Objective, Point
from hydragrad.trajectory.moments import Moment


def points_of(moment: Moment, objective: Objective) -> Iterator[tuple[Tensor, int, Point]]:
    """``(ids [b], epoch, point)`` of each micro-batch of a step."""
    params = tuple(moment.state.params[name] for name in objective.names)
    rest = {name: x for name, x in moment.state.params.items() if name not in objective.names}
    rest.update(moment.state.buffers)
    objective.follow_modes(moment.record.modes)
    epochs = moment.record.epochs or (moment.record.epoch,) * len(moment.batches)
    for (ids, batch), epoch in zip(moment.batches, epochs, strict=True):
        with torch.no_grad():
            shape = objective.loss_shape(params, rest, batch, len(ids))
            like = torch.empty(shape, dtype=params[0].dtype, device=params[0].device)
            coefficients = objective.problem.reduction.coefficients(batch, like).contiguous()
        yield ids, epoch, Point(params, rest, batch, coefficients, torch.ones_like(coefficients))
