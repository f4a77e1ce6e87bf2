"""Per-example gradients of linear layers as the two factors of an outer product, and their products with directions.

An example's gradient in a weight ``[m, n]`` is its output's gradient ``[m]`` times its input ``[n]``, transposed.
Written out for a batch that is b m n numbers, which leave the cache before the product with the directions reads them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from hydragrad.hypergradient.simplify import value_of
from hydragrad.shapes import in_rows

aten = torch.ops.aten

Factors = tuple[Tensor, Tensor]
"""``left`` [b, m, 1] and ``right`` [b, 1, n], for ``left * right`` [b, m, n]."""
_CHUNK = 2**17
"""Numbers of an outer product that are written out at a time: they stay in the cache."""


def factored(module: GraphModule) -> GraphModule:
    """The same graph with ``Factors`` in place of every result that is an outer product of two vectors an example."""
    output = next(node for node in module.graph.nodes if node.op == "output")
    with module.graph.inserting_before(output):
        output.args = ([_factors(leaf) or leaf for leaf in output.args[0]],)  # type: ignore[union-attr]
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def whole(gradient: Tensor | Factors) -> Tensor:
    """The per-example gradients ``[b, *shape]`` written out."""
    return gradient if isinstance(gradient, Tensor) else gradient[0] * gradient[1]


def terms_of(gradient: Tensor | Factors, scale: Tensor | float, directions: Tensor) -> Tensor:
    """``sum_p g_ip s_p d_kp``, [K, b]: directions d [K, *shape], scale s [*shape] or one number, gradients g.

    A tensor multiplies the gradients; a number waits for the product, which is smaller.
    """
    if isinstance(gradient, Tensor):
        scaled = gradient * scale if isinstance(scale, Tensor) else gradient
        terms = in_rows(directions) @ in_rows(scaled).T
    else:
        terms = _in_chunks(*gradient, scale if isinstance(scale, Tensor) else None, directions)
    return terms if isinstance(scale, Tensor) else terms.mul_(scale)


def _in_chunks(left: Tensor, right: Tensor, scale: Tensor | None, directions: Tensor) -> Tensor:
    b, _, n = right.shape
    most = max(1, _CHUNK // max(1, b * n))
    terms = directions.new_zeros(len(directions), b)
    for first in range(0, left.shape[1], most):
        rows = slice(first, first + most)
        gradient = left[:, rows] * right
        if scale is not None:
            gradient *= scale[rows]
        terms.addmm_(directions[:, rows].flatten(1), gradient.flatten(1).T)
    return terms


def _factors(leaf: Any) -> tuple[Node, Node] | None:
    """The two operands of a batched product over a dimension of length 1, if the node is that or its transpose."""
    turned, node = False, leaf
    while isinstance(node, Node) and _turns(node):
        turned, node = not turned, node.args[0]
    if not isinstance(node, Node) or node.target is not aten.bmm.default:
        return None
    left, right = node.args
    value = value_of(left)
    if value is None or value.shape[2] != 1 or not isinstance(left, Node) or not isinstance(right, Node):
        return None
    return (_turned(right), _turned(left)) if turned else (left, right)


def _turned(node: Node) -> Node:
    return node.graph.call_function(aten.transpose.int, (node, 1, 2))


def _turns(node: Node) -> bool:
    """Whether it exchanges the last two of three dimensions, which are no others where a batched product is turned."""
    if node.target is aten.permute.default:
        return node.args[1] == [0, 2, 1]
    return node.target is aten.transpose.int and {d % 3 for d in node.args[1:]} == {1, 2}  # type: ignore[operator]
