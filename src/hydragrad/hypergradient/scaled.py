"""Engines of the hessian-free sweep: per-example gradients, scaled elementwise, times fixed directions."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.factors import Factors, terms_of
from hydragrad.hypergradient.tracing import TracedFunction
from hydragrad.step.objective import Objective, Point, Vectors

Scale = Sequence[Tensor | float]


class ScaledEngine(abc.ABC):
    """Computes terms ``[K, b]`` (or ``[K, b, L]``): c_i grad loss_i . (scale * direction_k).

    ``scale``: for each parameter a tensor of its shape, or a number where all its elements share one.
    """

    name: ClassVar[str]
    batched: ClassVar[bool] = True

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    @abc.abstractmethod
    def terms(self, point: Point, scale: Scale, directions: Vectors) -> Tensor:
        """The terms of a block of directions."""

    def held(self, point: Point) -> int:
        """Bytes that stay from one block to the next of the same point."""
        return 0


@final
class Direct(ScaledEngine):
    """By an ordinary hessian-free engine on the scaled directions."""

    name = "direct"

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine.objective)
        self.engine = engine

    def terms(self, point: Point, scale: Scale, directions: Vectors) -> Tensor:
        return self.engine.products(point, tuple(s * d for s, d in zip(scale, directions, strict=True)))[1]

    def __repr__(self) -> str:
        return repr(self.engine)


@final
class PerExampleGradients(ScaledEngine):
    """The gradients of the batch found once by vmap over its examples, then a matrix product for each parameter.

    Right only where an example's loss does not depend on the rest of its batch, every tensor of the batch has the
    examples first and nothing is drawn; whoever chooses the engine compares it with another.
    """

    name = "per-example-gradients"

    def __init__(self, objective: Objective) -> None:
        super().__init__(objective)
        self._last: tuple[Point, Sequence[Tensor | Factors]] | None = None
        self._traced = TracedFunction(self.gradients, outer=True)

    def held(self, point: Point) -> int:
        """What was found for a point before; until then what all gradients take, written out."""
        if self._last is None:
            return point.coefficients.shape[0] * sum(p.nbytes for p in point.params)
        return sum(x.nbytes for found in self._last[1] for x in (found if isinstance(found, tuple) else (found,)))

    def terms(self, point: Point, scale: Scale, directions: Vectors) -> Tensor:
        if self._last is None or self._last[0] is not point:
            self._last = (
                point,
                self._traced(self.objective.mode, point.params, point.rest, point.batch, point.coefficients),
            )
        total: Tensor | None = None
        for gradient, s, d in zip(self._last[1], scale, directions, strict=True):
            part = terms_of(gradient, s, d)
            total = part if total is None else total.add_(part)
        assert total is not None
        return total

    def gradients(
        self, mode: int, params: Vectors, rest: dict[str, Tensor], batch: Any, coefficients: Tensor
    ) -> Vectors:
        """c_i grad loss_i of every example, ``[b, *shape]`` a parameter."""
        leaves, structure = pytree.tree_flatten(batch)
        b = coefficients.shape[0]
        dims = [0 if isinstance(x, Tensor) and x.dim() and x.shape[0] == b else None for x in leaves]

        def one(coefficient: Tensor, *rows: Any) -> Vectors:
            alone = [x if dim is None else x.unsqueeze(0) for x, dim in zip(rows, dims, strict=True)]

            def scalar(at: Vectors) -> Tensor:
                return (coefficient * self.objective.losses(at, rest, pytree.tree_unflatten(alone, structure))[0]).sum()

            return torch.func.grad(scalar)(params)

        return torch.func.vmap(one, in_dims=(0, *dims))(coefficients, *leaves)

    def __repr__(self) -> str:
        return f"<hessian-free engine {self.name}>"
