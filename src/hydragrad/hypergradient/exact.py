"""Engines of the exact method: C is the Hessian of the step's objective J."""

from typing import final

import torch
from torch import Tensor

from hydragrad.hypergradient.curvature import Engine, Products, over_block, rows_of, vjp, zeros
from hydragrad.step.objective import Point, Vectors


class _Exact(Engine):
    """Differentiates J + tau . V (Objective.scalar) twice in (w, v, weights, tau): all results come out together."""

    method = "exact"

    def _scalar(self, point: Point):
        def scalar(params: Vectors, carried: Vectors, weights: Tensor, tau: Vectors) -> Tensor:
            return self.objective.scalar(point, params, carried, weights, tau)

        return scalar


@final
class ForwardOverReverse(_Exact):
    """The forward-mode derivative of the gradient in (w, v, weights), along gam in w and bet in tau."""

    name = "forward-over-reverse"

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        gradient = torch.func.grad(self._scalar(point), argnums=(0, 1, 2))
        still_v, still_weights = zeros(point.carried), torch.zeros_like(point.weights)
        at = (point.params, point.carried, point.weights, still_v)

        def along(tangent: tuple[Vectors, Vectors]) -> tuple[Vectors, Tensor, Vectors]:
            pushed = torch.func.jvp(gradient, at, (tangent[0], still_v, still_weights, tangent[1]))[1]
            return pushed[0], pushed[2], pushed[1]

        return over_block(along, (gam, bet), drawing=point.draws)


@final
class ReverseOverReverse(_Exact):
    """The vector-Jacobian product of (w, v, weights) -> (g, V) with (gam, bet): gradients of gam . g + bet . V."""

    name = "reverse-over-reverse"

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        gradient = torch.func.grad(self._scalar(point), argnums=(0, 3))
        still = zeros(point.carried)
        _, pull = vjp(lambda p, v, c: gradient(p, v, c, still), point.params, point.carried, point.weights)
        curved, back, terms = over_block(pull, (gam, bet))
        return curved, terms, back


@final
class ReverseOverForward(_Exact):
    """The gradient in (w, v, weights) of the forward-mode derivative of J + tau . V along (gam, bet)."""

    name = "reverse-over-forward"

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        scalar, still = self._scalar(point), zeros(point.carried)

        def along(tangent: tuple[Vectors, Vectors]) -> tuple[Vectors, Tensor, Vectors]:
            def slope(params: Vectors, carried: Vectors, weights: Tensor) -> Tensor:
                return torch.func.jvp(lambda p, t: scalar(p, carried, weights, t), (params, still), tangent)[1]

            curved, back, terms = torch.func.grad(slope, argnums=(0, 1, 2))(point.params, point.carried, point.weights)
            return curved, terms, back

        return over_block(along, (gam, bet), drawing=point.draws)


@final
class DoubleBackward(_Exact):
    """Plain autograd, backward through backward, one vector at a time: whatever torch can differentiate twice."""

    name = "double-backward"
    batched = False

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        with torch.enable_grad():
            params, carried, tau = (
                tuple(x.detach().requires_grad_() for x in given)
                for given in (point.params, point.carried, zeros(point.carried))
            )
            weights = point.weights.detach().requires_grad_()
            scalar = self._scalar(point)(params, carried, weights, tau)
            both = torch.autograd.grad(scalar, (*params, *tau), create_graph=True, materialize_grads=True)
            blocks = rows_of(both, (*params, *carried, weights), (*gam, *bet))
        return blocks[: len(gam)], blocks[-1], blocks[len(gam) : -1]
