"""Engines of the gauss-newton method: C = J^T H J, J the Jacobian of the model's outputs, H the loss's Hessian."""

from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hydragrad.hypergradient.curvature import Engine, Products, over_block, rows_of, vjp
from hydragrad.step.objective import Point, Vectors


class GaussNewton(Engine):
    """J gam by some means, then H_out and the terms at the (small) outputs, then J^T by one backward pass.

    With carried buffers the Jacobian's transpose is taken in (w, v): dg/dv is J_w^T H_out J_v, and V goes along.
    """

    method = "gauss-newton"

    def _head(self, point: Point, others: list[Any]):
        def head(floats: Vectors) -> Tensor:
            return self.objective.head(
                floats, others, point.params, point.rest, point.batch, point.carried, point.draws
            )

        return head

    def outer(self, point: Point, floats: Vectors, others: list[Any], tangents: Vectors) -> tuple[Vectors, Tensor]:
        """``(H_out u, terms)`` for output tangents u ``[K, *output shape]``."""
        head = self._head(point, others)
        scale = point.coefficients * point.weights

        def along(tangent: Vectors) -> tuple[Vectors, Tensor]:
            def slopes(outputs: Vectors) -> Tensor:
                return torch.func.jvp(head, (outputs,), (tangent,))[1]

            terms, pull = vjp(slopes, floats)
            return pull(scale)[0], point.coefficients * terms

        return over_block(along, tangents, drawing=point.draws)


@final
class JvpThenVjp(GaussNewton):
    """J gam in forward mode, J^T in reverse mode."""

    name = "jvp-then-vjp"

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        def outputs(params: Vectors, carried: Vectors) -> tuple[Vectors, list[Any], Vectors]:
            return self.objective.outputs(params, point.rest, point.batch, carried, point.draws)

        _, others, _ = outputs(point.params, point.carried)

        def floats_of(params: Vectors, carried: Vectors = point.carried) -> tuple[Vectors, Vectors]:
            floats, _, after = outputs(params, carried)
            return floats, after

        (floats, _), pull = vjp(floats_of, point.params, point.carried)
        tangents = over_block(
            lambda t: torch.func.jvp(lambda p: floats_of(p)[0], (point.params,), (t,))[1], gam, drawing=point.draws
        )
        curved, terms = self.outer(point, floats, others, tangents)
        back_w, back_v = over_block(pull, (curved, bet))
        return back_w, terms, back_v


@final
class DoubleVjp(GaussNewton):
    """J gam as the derivative of the vector-Jacobian product in its cotangent: no forward mode needed of the model."""

    name = "double-vjp"
    batched = False

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        with torch.enable_grad():
            params = tuple(p.detach().requires_grad_() for p in point.params)
            carried = tuple(v.detach().requires_grad_() for v in point.carried)
            floats, others, after = self.objective.outputs(params, point.rest, point.batch, carried, point.draws)
            cotangents = tuple(torch.zeros_like(f, requires_grad=True) for f in floats)
            pulled = torch.autograd.grad(floats, params, cotangents, create_graph=True, materialize_grads=True)
            tangents = rows_of(pulled, cotangents, gam)
            fixed = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (floats, others))
            curved, terms = self.outer(point, fixed[0], fixed[1], tangents)
            back = rows_of((*floats, *after), (*params, *carried), (*curved, *bet))
        return back[: len(params)], terms.detach(), back[len(params) :]
