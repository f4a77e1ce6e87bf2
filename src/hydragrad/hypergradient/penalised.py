"""The penalty's curvature beside a Gauss-Newton matrix: its exact Hessian, whatever the model's part is."""

from typing import final

import torch

from hydragrad.hypergradient.curvature import Engine, Products, over_block
from hydragrad.step.objective import Objective, Point, Vectors


@final
class Penalised(Engine):
    """An engine of J^T H J, plus the penalty's Hessian; ``plain``: that by autograd twice, a vector at a time."""

    def __init__(self, engine: Engine, *, plain: bool) -> None:
        super().__init__(engine.objective)
        self.engine, self._product = engine, hessian_twice if plain else hessian_forward
        self.name, self.method, self.batched = engine.name, engine.method, engine.batched  # type: ignore[misc]

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        curved, terms, moved = self.engine.products(point, gam, bet)
        if point.first and curved is not None:
            curved = tuple(c + a for c, a in zip(curved, self._product(self.objective, point, gam), strict=True))
        return curved, terms, moved


def hessian_forward(objective: Objective, point: Point, block: Vectors) -> Vectors:
    """The penalty's Hessian times a block of vectors, all at once."""
    slope = torch.func.grad(lambda params: objective.penalty(params, point))
    return over_block(lambda tangent: torch.func.jvp(slope, (point.params,), (tangent,))[1], block)


def hessian_twice(objective: Objective, point: Point, block: Vectors) -> Vectors:
    """The same by plain autograd, one vector at a time."""
    with torch.enable_grad():
        params = tuple(p.detach().requires_grad_() for p in point.params)
        slope = torch.autograd.grad(objective.penalty(params, point), params, create_graph=True, materialize_grads=True)
        rows = []
        for k in range(block[0].shape[0]):
            along = torch.stack([(s * x[k]).sum() for s, x in zip(slope, block, strict=True)]).sum()
            if along.requires_grad:
                rows.append(torch.autograd.grad(along, params, retain_graph=True, materialize_grads=True))
            else:  # a penalty without curvature
                rows.append(tuple(torch.zeros_like(p) for p in params))
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
