"""From a moment of the trajectory to the points at which engines differentiate."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from hydragrad.errors import UnsupportedError, message
from hydragrad.step.objective import Objective, Point
from hydragrad.trajectory.moments import Moment
from hydragrad.trajectory.randomness import RandomState, seeded
from hydragrad.trajectory.state import StepRecord


def points_of(moment: Moment, objective: Objective) -> Iterator[tuple[Tensor, int, Point]]:
    """``(ids [b], epoch, point)`` of each micro-batch of a step, each with the buffers that those before it left.

    A skipped batch that moved buffers which carry derivatives is a micro-batch whose losses count nothing: with
    coefficients 0 only V remains of what an engine computes there.
    """
    params = tuple(moment.state.params[name] for name in objective.names)
    carried = tuple(moment.state.buffers[name] for name in objective.carried)
    known = {*objective.names, *objective.carried}
    others = {**moment.state.params, **moment.state.buffers}
    rest = {name: others[name] for name in sorted(others) if name not in known}  # a file has an order of its own
    objective.follow_modes(moment.record.modes)
    record, moved = moment.record, bool(objective.carried or objective.counters)
    epochs = (*(record.epochs or (record.epoch,) * len(record.batches)), *(one.epoch for one in record.passes))
    states = moment.random or (None,) * len(moment.batches)
    penalised = objective.problem.penalty is not None
    order = _in_order(record) if moved else list(range(len(record.batches)))
    for place in order:
        (ids, batch), epoch, random = moment.batches[place], epochs[place], states[place]
        nothing = torch.empty(0, dtype=params[0].dtype, device=params[0].device)
        point = Point(params, rest, batch, nothing, nothing, carried, first=penalised and place == 0)
        if random is not None:
            with random.restored():
                point = replace(point, draws=objective.drawn(point))
            if random.numpy is not None or random.python is not None:
                _refuse_other_noise(objective, point, random, moment.record.index)
        with torch.no_grad():
            like = nothing.new_empty(objective.loss_shape(point, len(ids)))
            counts = place < len(record.batches)
            coefficients = objective.problem.reduction.coefficients(batch, like) if counts else torch.zeros_like(like)
            coefficients = coefficients.contiguous()
        point = replace(point, coefficients=coefficients, weights=_weights(moment, ids, coefficients))
        yield ids, epoch, point
        if place != order[-1] and moved:
            carried, rest = objective.after(point)


def _in_order(record: StepRecord) -> list[int]:
    """Places of micro-batches and, behind them, of skipped batches, in the order in which they were run."""
    count, order = len(record.batches), list[int]()
    for place in range(count + 1):
        order += [count + k for k, one in enumerate(record.passes) if one.place == place]
        order += [place] if place < count else []
    return order


def _weights(moment: Moment, ids: Tensor, coefficients: Tensor) -> Tensor:
    """1 + eps of every loss, in the shape of the losses."""
    if moment.weights is None:
        return torch.ones_like(coefficients)
    weights = moment.weights[ids].to(coefficients)
    return weights.reshape(-1, *[1] * (coefficients.dim() - 1)).expand_as(coefficients).contiguous()


def _refuse_other_noise(objective: Objective, point: Point, random: RandomState, step: int) -> None:
    """Refuse losses that depend on draws of numpy or Python: only torch's can be handed out again as constants."""
    with torch.enable_grad(), objective.differentiable():
        at = (point.params, point.rest, point.batch, point.carried, point.draws)
        with random.restored():
            drawn = objective.losses(*at)
        with seeded("other numbers"):
            other = objective.losses(*at)
    if not torch.equal(drawn, other):
        raise UnsupportedError(
            message(
                f"the losses of step {step} depend on random numbers of numpy or Python",
                expected="noise inside the loss drawn by torch",
                cause="mixup or noise drawn with np.random or random; replay repeats it, derivatives cannot",
                remedy="draw with torch inside the loss (torch.rand, torch.distributions), and record again",
            )
        )
