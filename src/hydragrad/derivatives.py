"""Whether torch's derivatives of a model are right: against finite differences, in float64, on a few batches."""

from collections.abc import Iterator
from dataclasses import fields, replace

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hydragrad.copying import copy_of
from hydragrad.hypergradient.changing import go_to
from hydragrad.hypergradient.choosing import points_at
from hydragrad.hypergradient.costs import probe_block, probe_buffers
from hydragrad.hypergradient.curvature import zeros
from hydragrad.hypergradient.engines import reference
from hydragrad.hypergradient.queries import in_double
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.step.objective import Objective, Point, Vectors
from hydragrad.trajectory.moments import advance
from hydragrad.trajectory.randomness import seeded

DERIVATIVES = 1e-3
"""Relative error of torch's second derivatives above which some operation's derivative is wrong."""
_FEW = 8
_AHEAD = 64
"""Steps replayed from a stored state at most, to come to where the derivatives are looked at."""
_STEPS = (1e-6, 1e-7)
"""Steps of the differences; the second one where the first finds an error: fewer kinks are crossed by it."""


def worst_error(sweep: Sweep, method: str) -> float | None:
    """The largest ``derivative_error`` along a run: what is a constant in one phase of it need not be in another.

    Looked at once a run: near its start, its middle and its end, and where each other set of modes begins. Not at step
    0, of which no curvature counts: nothing moves with an example's weight before it.
    """
    key = ("derivatives", method, sweep.stop, sweep.objective.names)
    memo = sweep.run.memo
    if key not in memo:
        errors = [derivative_error(sweep.objective, point, method) for point in _along(sweep)]
        memo[key] = max((error for error in errors if error is not None), default=None)
    return memo[key]


def _along(sweep: Sweep) -> Iterator[Point]:
    """One point in each of those steps, with the objective in the step's modes."""
    trajectory, replayer, last = sweep.run.trajectory, sweep.replayer, sweep.stop - 1
    modes = {frozenset(trajectory.steps[t].modes.items()): t for t in trajectory.checkpoints[::-1] if t <= last}
    wanted = sorted({min(1, last), last // 2, last, *(t for t in modes.values() if t > 0)})
    for step in sorted({min(t, trajectory.nearest(t) + _AHEAD) for t in wanted}):
        state = go_to(trajectory, replayer, step)
        gradient = advance(replayer, trajectory.steps[step])
        points = points_at(sweep, state, gradient)
        yield max(points, key=lambda point: bool(point.coefficients.any()))  # the first that was not skipped


def derivative_error(objective: Objective, point: Point, method: str) -> float | None:
    """Relative error of torch's derivatives of this model against finite differences, in float64, on one batch.

    The reference engine's products against differences of first derivatives along one random vector: it finds kernels
    whose second derivative is wrong, which no comparison of engines can. A few of the batch's examples do where it can
    be cut: convolutions have no fast kernels in float64, and take a hundred times the memory of the batch. None if the
    model does not run in float64.
    """
    few = _few(objective, point)
    found = None if few is None else _smooth_error(objective, few, method)
    return _smooth_error(objective, point, method) if found is None else found


def _smooth_error(objective: Objective, point: Point, method: str) -> float | None:
    """The error with the first step that shows none; the smallest otherwise: a wrong derivative is so at every step."""
    smallest = None
    for h in _STEPS:
        error = _error(objective, point, method, h)
        if error is None or error <= DERIVATIVES:
            return error
        smallest = error if smallest is None else min(error, smallest)
    return smallest


def _few(objective: Objective, point: Point) -> Point | None:
    """The point with the batch's first examples, and draws of its own; None: they cannot be told, or are few."""
    count = len(point.coefficients)
    leaves = pytree.tree_leaves(point.batch)
    if count <= _FEW or not all(isinstance(x, Tensor) and x.dim() and len(x) == count for x in leaves):
        return None
    batch = pytree.tree_map(lambda x: x[:_FEW], point.batch)
    few = replace(point, batch=batch, coefficients=point.coefficients[:_FEW], weights=point.weights[:_FEW])
    if not point.draws:
        return few
    try:
        with seeded("derivatives"):
            return replace(few, draws=objective.drawn(replace(few, draws=())))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None


def _error(objective: Objective, point: Point, method: str, h: float) -> float | None:
    """See ``derivative_error``."""
    try:
        double = Objective(
            objective.problem,
            copy_of(objective.module).double(),
            objective.names,
            objective.carried,
            objective.counters,
        )
        here = Point(*(in_double(getattr(point, field.name)) for field in fields(Point)))
        vector = tuple(v / len(v) ** 0.5 for v in (x[0] for x in probe_block(here, 1)))
        with double.differentiable():
            gam = tuple(v.unsqueeze(0) for v in vector)
            bet = tuple(torch.zeros_like(v).unsqueeze(0) for v in here.carried)
            curved, terms, _ = reference(method, double).products(here, gam, bet)
            ends = [_first_derivatives(double, here, vector, sign * h) for sign in (1, -1)]
            buffers = _buffers_error(double, here, vector, method, h) if here.carried else 0.0
    except (RuntimeError, TypeError, NotImplementedError, ValueError, IndexError):
        return None
    pairs = [((ends[0][0] - ends[1][0]) * here.coefficients / (2 * h), terms[0])]
    if method == "exact" and curved is not None:
        up, down = (torch.cat([g.flatten() for g in end[1]]) for end in ends)
        pairs.append(((up - down) / (2 * h), torch.cat([c.flatten() for c in curved])))
    return max(buffers, *(float((a - b).norm()) / max(float(a.norm()), 1e-30) for a, b in pairs))


def _buffers_error(objective: Objective, point: Point, vector: Vectors, method: str, h: float) -> float:
    """As ``derivative_error``, for the buffers: V along random directions, and for ``exact`` g along one of v.

    A vector-Jacobian product has no entry to compare with a difference, so numbers are compared: its product with the
    direction, and the difference's with the cotangent.
    """
    engine, both = reference(method, objective), probe_buffers(point, 2)
    bet, along = tuple(x[:1] for x in both), tuple(x[1] for x in both)
    gam = tuple(v.unsqueeze(0) for v in vector)

    def paired(a: Vectors | None, b: Vectors) -> float:
        return sum(float((x * y).sum()) for x, y in zip(a or (), b, strict=True))

    def norm(a: Vectors) -> float:
        return paired(a, a) ** 0.5

    curved, _, back = engine.products(point, zeros(gam), bet)
    ends = [_moved(objective, point, vector, along, sign * h) for sign in (1, -1)]
    slopes = tuple((a - b) / (2 * h) for a, b in zip(*(end[1] for end in ends), strict=True))
    expected, found = paired(slopes, tuple(x[0] for x in bet)), paired(curved, gam) + paired(back, along)
    error = abs(found - expected) / max(norm(slopes) * norm(bet), 1e-30)
    if method != "exact":
        return error
    _, _, back = engine.products(point, gam, zeros(bet))
    ends = [_moved(objective, point, zeros(vector), along, sign * h) for sign in (1, -1)]
    slopes = tuple((a - b) / (2 * h) for a, b in zip(*(end[0] for end in ends), strict=True))
    scale = norm(vector) * (norm(slopes) + norm(ends[0][0]))  # g may not depend on v at all
    return max(error, abs(paired(back, along) - paired(slopes, vector)) / max(scale, 1e-30))


def _moved(objective: Objective, point: Point, vector: Vectors, along: Vectors, h: float) -> tuple[Vectors, Vectors]:
    """The gradient of J and V at (w, v) + h (vector, along)."""
    with torch.enable_grad():
        params = tuple((p + h * v).detach().requires_grad_() for p, v in zip(point.params, vector, strict=True))
        carried = tuple(p + h * v for p, v in zip(point.carried, along, strict=True))
        losses, after = objective.evaluate(params, point.rest, point.batch, carried, point.draws)
        scalar = (point.coefficients * point.weights * losses).sum()
        return torch.autograd.grad(scalar, params, materialize_grads=True), tuple(v.detach() for v in after)


def _first_derivatives(objective: Objective, point: Point, vector: Vectors, h: float) -> tuple[Tensor, Vectors]:
    """Losses and gradient of J at w + h v."""
    with torch.enable_grad():
        params = tuple((p + h * v).detach().requires_grad_() for p, v in zip(point.params, vector, strict=True))
        losses = objective.losses(params, point.rest, point.batch, point.carried, point.draws)
        scalar = (point.coefficients * point.weights * losses).sum()
        return losses.detach(), torch.autograd.grad(scalar, params, materialize_grads=True)
