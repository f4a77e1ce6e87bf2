"""What a curvature engine is: products C_t gam and per-example terms of a block of vectors, in one computation."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hydragrad.step.objective import Objective, Point, Vectors


class Engine(abc.ABC):
    """One way to compute, for a block gam ``[K, *shape]``, at a point of one micro-batch,

        C gam_k             tuple of [K, *shape]    (None for hessian-free)
        c_i grad loss_i . gam_k     [K, b] or [K, b, L]   the per-example terms d(g . gam)/d eps_i

    ``method`` names the curvature C; several engines of one method agree to rounding and differ in cost and in the
    derivatives they need of the model's operations.
    """

    name: ClassVar[str]
    method: ClassVar[str]
    batched: ClassVar[bool] = True
    """Whether a block costs less than its vectors one by one."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    @abc.abstractmethod
    def products(self, point: Point, gam: Vectors) -> tuple[Vectors | None, Tensor]:
        """``(C gam, terms)`` of the block."""

    def __repr__(self) -> str:
        return f"<{self.method} engine {self.name}>"


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """``torch.func.vjp`` of a function without auxiliary output, typed."""
    out, pull, *_ = torch.func.vjp(function, *primals)
    return out, pull


def over_block(function: Callable[[Any], Any], block: Any) -> Any:
    """``function`` over the leading axis of every tensor in ``block``; a block of one skips vmap and its overhead."""
    if pytree.tree_leaves(block)[0].shape[0] == 1:
        single = function(pytree.tree_map(lambda x: x[0], block))
        return pytree.tree_map(lambda x: x.unsqueeze(0), single)
    return torch.func.vmap(function)(block)
