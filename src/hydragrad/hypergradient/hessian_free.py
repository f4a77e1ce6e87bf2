"""Engines of the hessian-free method: C = 0, only the per-example terms c_i grad loss_i . gam."""

from typing import final

import torch
from torch import Tensor

from hydragrad.hypergradient.curvature import Engine, over_block
from hydragrad.step.objective import Point, Vectors


@final
class Jvp(Engine):
    """One forward-mode derivative of the losses a vector."""

    name = "jvp"
    method = "hessian-free"

    def products(self, point: Point, gam: Vectors) -> tuple[None, Tensor]:
        def losses(params: Vectors) -> Tensor:
            return self.objective.losses(params, point.rest, point.batch)

        slopes = over_block(lambda tangent: torch.func.jvp(losses, (point.params,), (tangent,))[1], gam)
        return None, point.coefficients * slopes


@final
class DoubleVjp(Engine):
    """The derivative of sum_i u_i grad loss_i . gam in u: backward twice, no forward mode needed of the model."""

    name = "double-vjp"
    method = "hessian-free"
    batched = False

    def products(self, point: Point, gam: Vectors) -> tuple[None, Tensor]:
        with torch.enable_grad():
            params = tuple(p.detach().requires_grad_() for p in point.params)
            losses = self.objective.losses(params, point.rest, point.batch)
            cotangent = torch.zeros_like(losses, requires_grad=True)
            pulled = torch.autograd.grad(losses, params, cotangent, create_graph=True, materialize_grads=True)
            rows = []
            for k in range(gam[0].shape[0]):
                pairs = [(p, g[k]) for p, g in zip(pulled, gam, strict=True) if p.requires_grad]
                outs, vectors = zip(*pairs, strict=True)
                rows.append(torch.autograd.grad(outs, cotangent, vectors, retain_graph=True)[0])
        return None, point.coefficients * torch.stack(rows)
