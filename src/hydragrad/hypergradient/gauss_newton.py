"""Engines of the gauss-newton method: C = J^T H J, J the Jacobian of the model's outputs, H the loss's Hessian."""

from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hydragrad.hypergradient.curvature import Engine, over_block, vjp
from hydragrad.step.objective import Point, Vectors


class _GaussNewton(Engine):
    """J gam by some means, then H_out and the terms at the (small) outputs, then J^T by one backward pass."""

    method = "gauss-newton"

    def _head(self, point: Point, others: list[Any]):
        def head(floats: Vectors) -> Tensor:
            return self.objective.head(floats, others, point.params, point.rest, point.batch)

        return head

    def _outer(self, point: Point, floats: Vectors, others: list[Any], tangents: Vectors) -> tuple[Vectors, Tensor]:
        """``(H_out u, terms)`` for output tangents u ``[K, *output shape]``."""
        head = self._head(point, others)
        scale = point.coefficients * point.weights

        def along(tangent: Vectors) -> tuple[Vectors, Tensor]:
            def slopes(outputs: Vectors) -> Tensor:
                return torch.func.jvp(head, (outputs,), (tangent,))[1]

            terms, pull = vjp(slopes, floats)
            return pull(scale)[0], point.coefficients * terms

        return over_block(along, tangents)


@final
class JvpThenVjp(_GaussNewton):
    """J gam in forward mode, J^T in reverse mode."""

    name = "jvp-then-vjp"

    def products(self, point: Point, gam: Vectors) -> tuple[Vectors, Tensor]:
        def outputs(params: Vectors) -> tuple[Vectors, list[Any]]:
            return self.objective.outputs(params, point.rest, point.batch)

        _, others = outputs(point.params)

        def floats_of(params: Vectors) -> Vectors:
            return outputs(params)[0]

        floats, pull = vjp(floats_of, point.params)
        tangents = over_block(lambda t: torch.func.jvp(floats_of, (point.params,), (t,))[1], gam)
        curved, terms = self._outer(point, floats, others, tangents)
        return over_block(lambda cotangent: pull(cotangent)[0], curved), terms


@final
class DoubleVjp(_GaussNewton):
    """J gam as the derivative of the vector-Jacobian product in its cotangent: no forward mode needed of the model."""

    name = "double-vjp"
    batched = False

    def products(self, point: Point, gam: Vectors) -> tuple[Vectors, Tensor]:
        with torch.enable_grad():
            params = tuple(p.detach().requires_grad_() for p in point.params)
            floats, others = self.objective.outputs(params, point.rest, point.batch)
            cotangents = tuple(torch.zeros_like(f, requires_grad=True) for f in floats)
            pulled = torch.autograd.grad(floats, params, cotangents, create_graph=True, materialize_grads=True)
            rows = []
            for k in range(gam[0].shape[0]):
                pairs = [(p, g[k]) for p, g in zip(pulled, gam, strict=True) if p.requires_grad]
                outs, vectors = zip(*pairs, strict=True)
                rows.append(torch.autograd.grad(outs, cotangents, vectors, retain_graph=True, materialize_grads=True))
            tangents = tuple(torch.stack(parts) for parts in zip(*rows, strict=True))
            fixed = pytree.tree_map(lambda x: x.detach() if isinstance(x, Tensor) else x, (floats, others))
            curved, terms = self._outer(point, fixed[0], fixed[1], tangents)
            back = [
                torch.autograd.grad(
                    floats, params, tuple(c[k] for c in curved), retain_graph=True, materialize_grads=True
                )
                for k in range(gam[0].shape[0])
            ]
        return tuple(torch.stack(parts) for parts in zip(*back, strict=True)), terms.detach()
