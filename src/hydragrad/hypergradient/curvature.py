"""What a curvature engine is: products C_t gam and per-example terms of a block of vectors, in one computation."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hydragrad.step.objective import Objective, Point, Vectors

Products = tuple[Vectors | None, Tensor, Vectors]


class Engine(abc.ABC):
    """One way to compute, for a block gam ``[K, *shape]``, at a point of one micro-batch,

        C gam_k + (dV/dw)^T bet_k              tuple of [K, *shape]    (None if neither is there)
        c_i grad loss_i . gam_k                [K, b] or [K, b, L]     the per-example terms d(g . gam)/d eps_i
        (dg/dv)^T gam_k + (dV/dv)^T bet_k      tuple of [K, *shape of v]    (empty if no buffer is carried)

    ``method`` names the curvature C and with it dg/dv, the rest of the gradient's derivative at (w, v); several engines
    of one method agree to rounding and differ in cost and in the derivatives they need of the model's operations.
    """

    name: ClassVar[str]
    method: ClassVar[str]
    batched: ClassVar[bool] = True
    """Whether a block costs less than its vectors one by one."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    @abc.abstractmethod
    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        """The three results for the block of cotangents ``gam`` of the gradient and ``bet`` of the buffers."""

    def held(self, point: Point) -> int:
        """Bytes that stay from one block to the next of the same point."""
        return 0

    def __repr__(self) -> str:
        return f"<{self.method} engine {self.name}>"


def vjp(function: Callable[..., Any], *primals: Any) -> tuple[Any, Callable[..., tuple[Any, ...]]]:
    """``torch.func.vjp`` of a function without auxiliary output, typed."""
    out, pull, *_ = torch.func.vjp(function, *primals)
    return out, pull


def zeros(tensors: Vectors) -> Vectors:
    """Zeros of the same shapes."""
    return tuple(torch.zeros_like(x) for x in tensors)


def rows_of(outputs: Vectors, inputs: Vectors, block: Vectors) -> Vectors:
    """Plain autograd, one vector at a time: cotangents ``block`` of ``outputs`` pulled back to ``inputs``."""
    rows = []
    for k in range(block[0].shape[0]):
        pairs = [(out, x[k]) for out, x in zip(outputs, block, strict=True) if out.requires_grad]
        if not pairs:
            rows.append(zeros(inputs))
            continue
        outs, vectors = zip(*pairs, strict=True)
        rows.append(torch.autograd.grad(outs, inputs, vectors, retain_graph=True, materialize_grads=True))
    return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


def over_block(function: Callable[[Any], Any], block: Any, *, drawing: Any = False) -> Any:
    """``function`` over the leading axis of every tensor in ``block``; a block of one skips vmap and its overhead.

    ``drawing``: random numbers are handed out inside, the same to every vector.
    """
    if pytree.tree_leaves(block)[0].shape[0] == 1:
        single = function(pytree.tree_map(lambda x: x[0], block))
        return pytree.tree_map(lambda x: x.unsqueeze(0), single)
    return torch.func.vmap(function, randomness="same" if drawing else "error")(block)
