"""Engines of the hessian-free method: C = 0 and dg/dv = 0; the per-example terms c_i grad loss_i . gam, and V."""

from typing import final

import torch
from torch import Tensor

from hydragrad.hypergradient.curvature import Engine, Products, over_block, rows_of, vjp
from hydragrad.step.objective import Point, Vectors


@final
class Jvp(Engine):
    """One forward-mode derivative of the losses a vector; one backward pass of the buffers, if any are carried."""

    name = "jvp"
    method = "hessian-free"

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        def losses(params: Vectors) -> Tensor:
            return self.objective.losses(params, point.rest, point.batch, point.carried, point.draws)

        def after(params: Vectors, carried: Vectors) -> Vectors:
            return self.objective.evaluate(params, point.rest, point.batch, carried, point.draws)[1]

        slopes = over_block(
            lambda tangent: torch.func.jvp(losses, (point.params,), (tangent,))[1], gam, drawing=point.draws
        )
        curved, back = None, ()
        if point.carried:
            _, pull = vjp(after, point.params, point.carried)
            curved, back = over_block(pull, bet)
        return curved, point.coefficients * slopes, back


@final
class DoubleVjp(Engine):
    """The derivative of sum_i u_i grad loss_i . gam in u: backward twice, no forward mode needed of the model."""

    name = "double-vjp"
    method = "hessian-free"
    batched = False

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        with torch.enable_grad():
            params = tuple(p.detach().requires_grad_() for p in point.params)
            carried = tuple(v.detach().requires_grad_() for v in point.carried)
            losses, after = self.objective.evaluate(params, point.rest, point.batch, carried, point.draws)
            cotangent = torch.zeros_like(losses, requires_grad=True)
            pulled = torch.autograd.grad(losses, params, cotangent, create_graph=True, materialize_grads=True)
            (terms,) = rows_of(pulled, (cotangent,), gam)
            back = rows_of(after, (*params, *carried), bet) if carried else None
        if back is None:
            return None, point.coefficients * terms, ()
        return back[: len(params)], point.coefficients * terms, back[len(params) :]
