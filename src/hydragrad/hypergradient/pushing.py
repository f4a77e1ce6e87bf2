"""Tangents of parameters and buffers pushed through the gradient and the buffers' update, for the forward sweep.

Where no buffer is carried the curvature is symmetric, and an engine's product serves both sweeps. With buffers the
derivative of (w, v) -> (g, V) is not, and the forward sweep needs it the other way round than the reverse sweep.
"""

from collections.abc import Callable
from typing import Any, final

import torch

from hydragrad.hypergradient.costs import agree
from hydragrad.hypergradient.curvature import over_block, rows_of, zeros
from hydragrad.hypergradient.gauss_newton import JvpThenVjp
from hydragrad.step.objective import Objective, Point, Vectors

Tangent = tuple[Vectors, Vectors]


@final
class Push:
    """(h, y) -> ((dg/dw) h + (dg/dv) y, (dV/dw) h + (dV/dv) y), blocks ``[n, *shape]``, as the method has dg.

    ``exact``: the derivative of g itself; ``gauss-newton``: J_w^T H_out (J_w h + J_v y); ``hessian-free``: 0. In
    forward mode where that works and agrees with plain autograd at the first point, else by backward passes.
    """

    def __init__(self, method: str, objective: Objective) -> None:
        self.method, self.objective = method, objective
        self._way: Callable[[Point, Tangent], Tangent] | None = None

    def __call__(self, point: Point, h: Vectors, y: Vectors) -> Tangent:
        if self._way is None:
            self._way = self._chosen(point, tuple(x[:1] for x in h), tuple(x[:1] for x in y))
        return self._way(point, (h, y))

    def _chosen(self, point: Point, h: Vectors, y: Vectors) -> Callable[[Point, Tangent], Tangent]:
        probe = tuple(torch.ones_like(x) for x in h), tuple(torch.ones_like(x) for x in y)
        truth, nothing = self.backwards(point, probe), point.coefficients.new_zeros(1, 1)
        try:
            found = self.forwards(point, probe)
        except (RuntimeError, NotImplementedError, TypeError, ValueError):
            return self.backwards
        same = agree((found[0], nothing, found[1]), (truth[0], nothing, truth[1]))
        return self.forwards if same else self.backwards

    def forwards(self, point: Point, tangents: Tangent) -> Tangent:
        """By forward-mode derivatives, all vectors at once."""
        engine = JvpThenVjp(self.objective)
        others = self._outputs(point, point.params, point.carried)[1] if self.method == "gauss-newton" else []

        def moved(params: Vectors, carried: Vectors) -> Tangent:
            if self.method == "gauss-newton":
                floats, _, after = self._outputs(point, params, carried)
                return floats, after
            if self.method == "hessian-free":
                return (), self._after(point, params, carried)
            still = zeros(point.carried)
            scalar = torch.func.grad(
                lambda p, tau: self.objective.scalar(point, p, carried, point.weights, tau), argnums=(0, 1)
            )
            return scalar(params, still)

        at = (point.params, point.carried)
        pushed = over_block(lambda t: torch.func.jvp(moved, at, t)[1], tangents, drawing=point.draws)
        if self.method != "gauss-newton":
            return self._filled(pushed, tangents)
        floats = self._outputs(point, *at)[0]
        curved, _ = engine.outer(point, floats, others, pushed[0])
        with torch.enable_grad():
            params = tuple(p.detach().requires_grad_() for p in point.params)
            return rows_of(self._outputs(point, params, point.carried)[0], params, curved), pushed[1]

    def backwards(self, point: Point, tangents: Tangent) -> Tangent:
        """By backward passes alone, one vector at a time: the derivative of a vector-Jacobian product in its vector."""
        count = len(point.params)
        with torch.enable_grad():
            params, carried, tau = (
                tuple(x.detach().requires_grad_() for x in given)
                for given in (point.params, point.carried, zeros(point.carried))
            )
            others: list[Any] = []
            if self.method == "gauss-newton":
                outs, others, after = self._outputs(point, params, carried)
            elif self.method == "hessian-free":
                outs, after = (), self._after(point, params, carried)
            else:
                scalar = self.objective.scalar(point, params, carried, point.weights, tau)
                both = torch.autograd.grad(scalar, (*params, *tau), create_graph=True, materialize_grads=True)
                outs, after = both[:count], both[count:]
            pushed = _transposed((*outs, *after), (*params, *carried), (*tangents[0], *tangents[1]))
            first, second = pushed[: len(outs)], pushed[len(outs) :]
            if self.method == "gauss-newton":
                fixed = tuple(x.detach() for x in outs)
                curved, _ = JvpThenVjp(self.objective).outer(point, fixed, others, first)
                first = rows_of(outs, params, curved)
        return self._filled((first, second), tangents)

    @staticmethod
    def _filled(pushed: Tangent, tangents: Tangent) -> Tangent:
        return pushed[0] or zeros(tangents[0]), pushed[1]

    def _outputs(self, point: Point, params: Vectors, carried: Vectors) -> tuple[Vectors, list[Any], Vectors]:
        return self.objective.outputs(params, point.rest, point.batch, carried, point.draws)

    def _after(self, point: Point, params: Vectors, carried: Vectors) -> Vectors:
        return self.objective.evaluate(params, point.rest, point.batch, carried, point.draws)[1]


def _transposed(outputs: Vectors, inputs: Vectors, block: Vectors) -> Vectors:
    """Tangents ``block`` of ``inputs`` pushed to ``outputs``: twice backward."""
    live = [x.requires_grad for x in outputs]
    cotangents = tuple(torch.zeros_like(x, requires_grad=True) for x in outputs)
    pairs = [(out, u) for out, u, lives in zip(outputs, cotangents, live, strict=True) if lives]
    if not pairs:
        return tuple(x.new_zeros(block[0].shape[0], *x.shape) for x in outputs)
    outs, vectors = zip(*pairs, strict=True)
    pulled = torch.autograd.grad(outs, inputs, vectors, create_graph=True, materialize_grads=True)
    return rows_of(pulled, cotangents, block)
