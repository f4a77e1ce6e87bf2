"""Whether torch's slopes of a measurement are right: against finite differences of it, on a few queries."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hydragrad.errors import HydragradError, MismatchError, message
from hydragrad.hypergradient.queries import Queries
from hydragrad.step.objective import Vectors
from hydragrad.trajectory.randomness import seeded, undisturbed
from hydragrad.trajectory.state import State

_FEW = 4
_STEP = {torch.float64: 1e-6, torch.float32: 5e-3}
"""Step of the differences, by dtype: about the cube root of its rounding."""
_ROUNDING = 30
"""Units in the last place that a measurement may be off by."""


def slope_error(queries: Queries, state: State) -> float | None:
    """Relative error of d m / d(w, v) along one random direction, on a few queries; in float64 if they run so.

    It finds what the queries' measurement takes for a constant although it follows the parameters, which retraining
    shows only where it is large. None: the measurement draws random numbers, or is not finite. Raises MismatchError
    for a measurement that no parameter moves.
    """
    chosen = torch.linspace(0, queries.count - 1, min(_FEW, queries.count)).long()
    with torch.enable_grad(), undisturbed():
        slopes = _tried(queries.doubled(), state, chosen, torch.float64)
        if slopes is None:
            slopes = _tried(queries, state, chosen, next(iter(state.params.values())).dtype)
        if slopes is None:  # the sweep meets what fails here too, and says it in words
            return None
        if slopes.flat and _flat(queries, state):
            raise MismatchError(_constant(queries.count))
    return slopes.error


@final
@dataclass(frozen=True)
class _Compared:
    """``flat``: every slope is exactly zero, or there is none."""

    error: float | None
    flat: bool


def _tried(queries: Queries, state: State, chosen: Tensor, dtype: torch.dtype) -> _Compared | None:
    """As ``_compared``; None where the measurement does not run so."""
    try:
        return _compared(queries, state, chosen, dtype)
    except torch.OutOfMemoryError:
        raise
    except (
        HydragradError,
        RuntimeError,
        TypeError,
        NotImplementedError,
        ValueError,
        IndexError,
        KeyError,
        AttributeError,
    ):
        return None


def _compared(queries: Queries, state: State, chosen: Tensor, dtype: torch.dtype) -> _Compared:
    """All of the chosen, as a vector."""
    flat, beyond, scale = True, list[Tensor](), list[Tensor]()
    for measure, at in queries.functions(state, chosen):
        slopes, found = _slopes(measure, at, dtype)
        flat = flat and not any(bool(g.any()) for row in slopes for g in row)
        if found is not None:
            beyond.append(found[0])
            scale.append(found[1])
    if not beyond:
        return _Compared(None, flat)
    return _Compared(float(torch.cat(beyond).norm()) / max(float(torch.cat(scale).norm()), 1e-30), flat)


def _slopes(
    measure: Callable[[Vectors], Tensor], at: Vectors, dtype: torch.dtype
) -> tuple[list[Vectors], tuple[Tensor, Tensor] | None]:
    """The slopes of each query; how far they are from the differences along a direction, beyond doubt, and their scale.

    At a kink the differences to both sides are apart, and torch's slope is between them; by rounding they are as well.
    So much is in doubt.
    """
    h = _STEP.get(dtype, _STEP[torch.float32])
    leaves = tuple(x.detach().requires_grad_() for x in at)
    out = measure(leaves)
    if not out.requires_grad:
        return [], None
    rows = [
        torch.autograd.grad(out, leaves, row, retain_graph=True, materialize_grads=True)
        for row in torch.eye(len(out), dtype=out.dtype, device=out.device)
    ]
    along = _direction(at)
    middle, up, down = (
        measure(tuple(x + k * h * v for x, v in zip(at, along, strict=True))).detach() for k in (0, 1, -1)
    )
    finite = all(bool(x.isfinite().all()) for x in (middle, up, down, *(g for row in rows for g in row)))
    eps = torch.finfo(dtype).eps
    if not finite or not torch.allclose(middle, out.detach(), rtol=_ROUNDING * eps, atol=_ROUNDING * eps):
        return rows, None  # it draws: every time other numbers
    expected = (up - down) / (2 * h)
    torchs = torch.stack([torch.stack([(g * v).sum() for g, v in zip(row, along, strict=True)]).sum() for row in rows])
    doubt = (up - 2 * middle + down).abs() / h + _ROUNDING * eps * middle.abs().clamp(min=1) / h
    beyond = ((expected - torchs).abs() - doubt).clamp(min=0)
    scale = torch.maximum(expected.abs(), torchs.abs())
    return rows, (beyond.cpu().double(), scale.cpu().double())


def _direction(at: Vectors) -> Vectors:
    """A random direction, the same whatever device and dtype."""
    with seeded("slopes"):
        drawn = [torch.randn(x.shape, dtype=torch.float64) for x in at]
    return tuple((v / max(1, len(v) if v.dim() else 1) ** 0.5).to(x) for v, x in zip(drawn, at, strict=True))


def _flat(queries: Queries, state: State) -> bool:
    """Whether no query at all has a slope other than exactly zero."""
    for measure, at in queries.functions(state, torch.arange(queries.count)):
        leaves = tuple(x.detach().requires_grad_() for x in at)
        out = measure(leaves)
        if not out.isfinite().all():
            return False  # named as that elsewhere
        if out.requires_grad and queries.count == 1:
            return False  # one alone may be truly flat: a loss over pairs, a saturated one
        if out.requires_grad and any(
            bool(g.any()) for g in torch.autograd.grad(out.sum(), leaves, materialize_grads=True)
        ):
            return False
    return True


def _constant(count: int) -> str:
    return message(
        "the measurement does not follow the parameters: its slope is zero for every query",
        expected="a measurement (or loss) of the model that is given, with a gradient",
        got=f"no gradient, or zeros, for all {count} queries",
        cause="torch.no_grad(), detach(), .item() or numpy inside it, a count of right answers (argmax, round), "
        "another model than the one it is given, or a loss that is flat there",
        remedy="measure by differentiable operations of model(...) alone, the loss or a margin in place of accuracy",
    )
