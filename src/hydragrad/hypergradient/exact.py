"""Engines of the exact method: C is the Hessian of the step's objective J."""

from typing import final

import torch
from torch import Tensor

from hydragrad.hypergradient.curvature import Engine, over_block, vjp
from hydragrad.step.objective import Point, Vectors


class _Exact(Engine):
    """Differentiates (w, weights) -> (grad_w J, grad_weights J) once more: H gam and the terms come out together."""

    method = "exact"

    def _scalar(self, point: Point):
        def scalar(params: Vectors, weights: Tensor) -> Tensor:
            return self.objective.scalar(params, point.rest, point.batch, point.coefficients, weights)

        return scalar


@final
class ForwardOverReverse(_Exact):
    """H gam and d(g . gam)/d eps as the forward-mode derivative of the gradient in (w, weights) along (gam, 0)."""

    name = "forward-over-reverse"

    def products(self, point: Point, gam: Vectors) -> tuple[Vectors, Tensor]:
        gradient = torch.func.grad(self._scalar(point), argnums=(0, 1))
        still = torch.zeros_like(point.weights)

        def along(tangent: Vectors) -> tuple[Vectors, Tensor]:
            return torch.func.jvp(gradient, (point.params, point.weights), (tangent, still))[1]

        return over_block(along, gam)


@final
class ReverseOverReverse(_Exact):
    """The vector-Jacobian product of (w, weights) -> g with gam: both results are gradients of the number g . gam."""

    name = "reverse-over-reverse"

    def products(self, point: Point, gam: Vectors) -> tuple[Vectors, Tensor]:
        gradient = torch.func.grad(self._scalar(point))
        _, pull = vjp(gradient, point.params, point.weights)
        return over_block(pull, gam)


@final
class ReverseOverForward(_Exact):
    """The gradient in (w, weights) of the forward-mode derivative of J along gam."""

    name = "reverse-over-forward"

    def products(self, point: Point, gam: Vectors) -> tuple[Vectors, Tensor]:
        scalar = self._scalar(point)

        def along(tangent: Vectors) -> tuple[Vectors, Tensor]:
            def slope(params: Vectors, weights: Tensor) -> Tensor:
                return torch.func.jvp(lambda p: scalar(p, weights), (params,), (tangent,))[1]

            return torch.func.grad(slope, argnums=(0, 1))(point.params, point.weights)

        return over_block(along, gam)


@final
class DoubleBackward(_Exact):
    """Plain autograd, backward through backward, one vector at a time: whatever torch can differentiate twice."""

    name = "double-backward"
    batched = False

    def products(self, point: Point, gam: Vectors) -> tuple[Vectors, Tensor]:
        with torch.enable_grad():
            params = tuple(p.detach().requires_grad_() for p in point.params)
            weights = point.weights.detach().requires_grad_()
            scalar = self._scalar(point)(params, weights)
            gradient = torch.autograd.grad(scalar, params, create_graph=True, materialize_grads=True)
            rows = [self._row(gradient, (*params, weights), [g[k] for g in gam]) for k in range(gam[0].shape[0])]
        blocks = [torch.stack(parts) for parts in zip(*rows, strict=True)]
        return tuple(blocks[:-1]), blocks[-1]

    @staticmethod
    def _row(gradient: Vectors, inputs: Vectors, vector: list[Tensor]) -> Vectors:
        pairs = [(g, v) for g, v in zip(gradient, vector, strict=True) if g.requires_grad]
        outputs, vectors = zip(*pairs, strict=True)
        return torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, materialize_grads=True)
