"""The forward sweep (HYDRA's Algorithm 1): derivatives of the trained parameters in chosen examples' weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import final

import torch
from torch import Tensor

from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.penalised import hessian_twice
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.pushing import Push
from hydragrad.hypergradient.queries import pulled_back
from hydragrad.hypergradient.stepping import linearized
from hydragrad.step.objective import Objective, Point, Vectors
from hydragrad.step.optimizer_map import OptimizerMap
from hydragrad.step.updates import Slots
from hydragrad.trajectory.moments import Moment


@final
class Tangents:
    """``h`` = dw/d eps_i, ``z`` = ds/d eps_i and ``y`` = dv/d eps_i of n examples.

    One block ``[n, *shape]`` a parameter, a parameter and slot, a buffer that training changes.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        slots: Sequence[tuple[str, ...]],
        count: int,
        carried: Sequence[Tensor] = (),
    ) -> None:
        self.h, self.y = (
            [torch.zeros(count, *p.shape, dtype=p.dtype, device=p.device) for p in given] for given in (params, carried)
        )
        self.z: list[Slots] = [
            {slot: torch.zeros_like(h) for slot in names} for h, names in zip(self.h, slots, strict=True)
        ]

    def flat(self) -> Tensor:
        """H as ``[n, P]``."""
        return torch.cat([h.unsqueeze(-1).flatten(1) for h in self.h], dim=1)

    def flat_buffers(self) -> Tensor:
        """Y as ``[n, Q]``, Q the numbers in all carried buffers."""
        return torch.cat([self.h[0].new_empty(len(self.h[0]), 0), *(y.unsqueeze(-1).flatten(1) for y in self.y)], dim=1)


def forward_sweep(
    moments: Iterable[Moment],
    objective: Objective,
    optimizer: OptimizerMap,
    engine: Engine | None,
    examples: Tensor,
    tangents: Tangents,
    block: int,
    watch: Callable[[int], None],
) -> Tangents:
    """Carry ``tangents`` forward over ``moments``: dg = C_t h_i + [i in B_t] dg_t/d eps_i, then the JVP of U_t.

    ``engine`` None: C = 0 (hessian-free). With carried buffers dg gets (dg/dv) y_i, and from each micro-batch
    to the next y_i <- (dV/dw) h_i + (dV/dv) y_i. The paper prints the condition inverted; it reads "in the batch".
    """
    push = Push("hessian-free" if engine is None else engine.method, objective) if objective.carried else None
    for moment in moments:
        with objective.differentiable():
            clipping, linearizations = linearized(moment, optimizer)
            dg = [torch.zeros_like(h) for h in tangents.h]
            for ids, _, point in points_of(moment, objective):
                if push is not None:
                    _push(push, point, tangents, dg, block)
                elif engine is not None:
                    _add_curvature(engine, point, tangents.h, dg, block)
                _add_own_gradients(objective, point, ids, examples, dg)
            clipping.push_(dg)
            for p, linearization in enumerate(linearizations):
                if linearization is not None:
                    tangents.h[p], tangents.z[p] = linearization.jvp(tangents.h[p], tangents.z[p], dg[p])
        watch(moment.record.index)
    return tangents


def _add_curvature(engine: Engine, point: Point, h: list[Tensor], dg: list[Tensor], block: int) -> None:
    for first in range(0, h[0].shape[0], block):
        chosen = slice(first, first + block)
        curved = engine.products(point, tuple(x[chosen] for x in h))[0]
        for total, c in zip(dg, curved or (), strict=False):
            total[chosen] += c


def _push(push: Push, point: Point, tangents: Tangents, dg: list[Tensor], block: int) -> None:
    for first in range(0, tangents.h[0].shape[0], block):
        chosen = slice(first, first + block)
        h = tuple(x[chosen] for x in tangents.h)
        added, moved = push(point, h, tuple(y[chosen] for y in tangents.y))
        if point.first and push.method == "gauss-newton":
            added = tuple(x + p for x, p in zip(added, hessian_twice(push.objective, point, h), strict=True))
        for total, x in zip(dg, added, strict=True):
            total[chosen] += x
        for y, x in zip(tangents.y, moved, strict=True):
            y[chosen] = x


def _add_own_gradients(objective: Objective, point: Point, ids: Tensor, examples: Tensor, dg: list[Tensor]) -> None:
    """dg_t/d eps_i = c_i grad loss_i, once for every time the example occurs in the batch."""
    occurs = examples[:, None] == ids[None, :]
    rows = occurs.any(1).nonzero().flatten()
    if not len(rows):
        return
    coefficients = point.coefficients
    occurrences = occurs[rows].to(coefficients)
    cotangents = occurrences.reshape(*occurrences.shape, *(1,) * (coefficients.dim() - 1)) * coefficients

    def losses(params: Vectors) -> Tensor:
        return objective.losses(params, point.rest, point.batch, point.carried, point.draws)

    for total, gradient in zip(dg, pulled_back(losses, point.params, cotangents), strict=True):
        total.index_add_(0, rows.to(total.device), gradient)
