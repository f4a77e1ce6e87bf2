"""Traced graphs in the words of torch's own Python bindings: the same kernels, called at half the price.

A traced graph names operators by their overload (``torch.ops.aten.mul.Tensor``), and calling one goes through a general
way in that boxes every argument: 2 to 4 microseconds, where ``torch.mul`` takes one. A product of a small model has a
hundred operations of a few microseconds each.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten

_FUNCTIONS: dict[Any, Callable[..., Any]] = {
    aten.add.Scalar: torch.add,
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.baddbmm.default: torch.baddbmm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.convolution.default: torch.convolution,
    aten.cos.default: torch.cos,
    aten.div.Scalar: torch.div,
    aten.div.Tensor: torch.div,
    aten.erf.default: torch.erf,
    aten.exp.default: torch.exp,
    aten.gather.default: torch.gather,
    aten.index_select.default: torch.index_select,
    aten.log.default: torch.log,
    aten.mm.default: torch.mm,
    aten.mul.Scalar: torch.mul,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.reciprocal.default: torch.reciprocal,
    aten.relu.default: torch.relu,
    aten.rsqrt.default: torch.rsqrt,
    aten.select.int: torch.select,
    aten.sigmoid.default: torch.sigmoid,
    aten.sin.default: torch.sin,
    aten.sqrt.default: torch.sqrt,
    aten.squeeze.dim: torch.squeeze,
    aten.sub.Scalar: torch.sub,
    aten.sub.Tensor: torch.sub,
    aten.sum.default: torch.sum,
    aten.sum.dim_IntList: torch.sum,
    aten.t.default: torch.t,
    aten.tanh.default: torch.tanh,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.where.self: torch.where,
    aten.zeros.default: torch.zeros,
}
"""Bindings that take an overload's arguments in its order and choose that overload for them."""
_METHODS = {aten.view.default: "view", aten.expand.default: "expand"}
_KEYWORDS = {"alpha", "dtype", "device"}
"""Keywords that a binding takes under the overload's name."""


def lowered(module: GraphModule) -> GraphModule:
    """The same operations bit for bit, called by their bindings where there is one."""
    for node in module.graph.nodes:
        if node.op != "call_function" or not _KEYWORDS.issuperset(node.kwargs) or _emptied(node):
            continue
        if node.target in _FUNCTIONS:
            node.target = _FUNCTIONS[node.target]
        elif node.target in _METHODS:
            node.op, node.target = "call_method", _METHODS[node.target]
    module.graph.lint()
    module.recompile()
    return module


def _emptied(node: Node) -> bool:
    """A sum over no dimensions: the overload sums all of them, as ``torch.sum(x, [])`` does only by a special case."""
    return node.target is aten.sum.dim_IntList and not node.args[1]
