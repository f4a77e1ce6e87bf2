"""Rewriting traced graphs: what function transforms compute twice, or as zeros, is taken out."""

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

aten = torch.ops.aten

_SAME = {aten.alias.default, aten.detach.default, aten.lift_fresh_copy.default, aten.lift_fresh.default}
"""Operations whose result is their input, once nothing is changed in place."""
_SHAPED = {aten.view.default, aten.expand.default, aten._unsafe_view.default, aten.reshape.default}
"""Operations that are the identity where they do not change the shape."""
_KEEP_ZERO = {
    *_SAME,
    *_SHAPED,
    aten.t.default,
    aten.transpose.int,
    aten.permute.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.select.int,
    aten.slice.Tensor,
    aten.neg.default,
    aten.clone.default,
}
_ZERO_IF_ANY = {aten.mul.Tensor, aten.mm.default, aten.bmm.default}
_PRODUCTS = {*_ZERO_IF_ANY, aten.convolution.default}
_COPIES = {aten.clone.default, aten._to_copy.default}
"""Operations that are the identity where shape, type and place in memory stay: nothing is changed in place."""
_ZEROS = {aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten._efficientzerotensor.default}
_RANDOM = torch.Tag.nondeterministic_seeded


def simplified(module: GraphModule) -> GraphModule:
    """The same function with fewer operations; a graph that changes tensors in place is left as it is.

    Common subexpressions are computed once (vjp and jvp of one function each run its forward pass); identities and
    pairs of transpositions go; sums with, and products of, tensors of zeros go (the tangent of a batch is zero).
    Random operations stay as they are.
    """
    graph = module.graph
    if changes_in_place(module):
        return module
    zeros: set[Node] = set()
    seen: dict[Any, Node] = {}
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        same = _identity(node) or _sum_with_zero(node, zeros)
        if same is None:
            same = seen.setdefault(key_of(node.target, node.args, node.kwargs), node) if _repeatable(node) else node
        if same is not node:
            node.replace_all_uses_with(same)
            graph.erase_node(node)
        elif _is_zero(node, zeros):
            zeros.add(node)
    _drop_zero_products(graph, zeros)
    graph.eliminate_dead_code()
    graph.lint()
    module.recompile()
    return module


def changes_in_place(module: GraphModule) -> bool:
    """Whether an operation of the graph writes into its input."""
    calls = (node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return any(target._schema.is_mutable for target in calls)


def draws_numbers(module: GraphModule) -> bool:
    """Whether an operation of the graph draws random numbers: it must run as often as before."""
    calls = (node.target for node in module.graph.nodes if isinstance(node.target, torch._ops.OpOverload))
    return any(_RANDOM in target.tags for target in calls)


def value_of(node: Any) -> Tensor | None:
    """What the node was when traced: a tensor without numbers."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return value if isinstance(value, Tensor) else None


def _like(a: Any, b: Any) -> bool:
    """Same shape, type and place in memory: views that were right of one are right of the other."""
    x, y = value_of(a), value_of(b)
    if x is None or y is None:
        return False
    return x.shape == y.shape and x.stride() == y.stride() and x.dtype == y.dtype


def _identity(node: Node) -> Node | None:
    """The node that this one equals by itself."""
    source = node.args[0] if node.args else None
    if not isinstance(source, Node):
        return None
    if node.target in _SAME or (node.target in _SHAPED and _like(node, source)):
        return source
    returned = any(user.op == "output" for user in node.users)  # whoever gets it may write to it
    if node.target in _COPIES and _like(node, source) and not returned:
        return source
    if node.target is aten.copy.default and isinstance(node.args[1], Node) and _like(node, node.args[1]):
        return None if returned else node.args[1]
    twice = node.target is aten.t.default and source.target is aten.t.default
    return source.args[0] if twice and isinstance(source.args[0], Node) else None


def _sum_with_zero(node: Node, zeros: set[Node]) -> Node | None:
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    for kept, other in (node.args[:2], node.args[1::-1]):
        if other in zeros and isinstance(kept, Node) and _like(kept, node):
            return kept
    return None


def _is_zero(node: Node, zeros: set[Node]) -> bool:
    if node.target in _ZEROS:
        return True
    tensors = [arg for arg in node.args if isinstance(arg, Node)]
    if node.target is aten.convolution.default:
        return node.args[2] is None and any(arg in zeros for arg in tensors[:2])
    if node.target in _KEEP_ZERO:
        return bool(tensors) and tensors[0] in zeros
    return node.target in _ZERO_IF_ANY and any(arg in zeros for arg in tensors)


def _drop_zero_products(graph: Graph, zeros: set[Node]) -> None:
    """A product that is zero, yet used, becomes a tensor of zeros."""
    for node in zeros:
        value = value_of(node)
        if node.target in _PRODUCTS and node.users and value is not None and value.is_contiguous():
            with graph.inserting_after(node):
                made = graph.call_function(
                    aten.zeros.default, (list(value.shape),), {"dtype": value.dtype, "device": value.device}
                )
            made.meta["val"] = value
            node.replace_all_uses_with(made)


def _repeatable(node: Node) -> bool:
    return (isinstance(node.target, torch._ops.OpOverload) and _RANDOM not in node.target.tags) or _is_getitem(node)


def _is_getitem(node: Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def key_of(target: Any, args: Any, kwargs: Any) -> Any:
    """What two calls have in common that compute the same."""
    return (target, _frozen(args), _frozen(kwargs))


def _frozen(value: Any) -> Any:
    """The value as something hashable, numbers told apart by their type (1 and 1.0 and True are not the same)."""
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(part) for part in value)
    if isinstance(value, dict):
        return tuple(sorted((key, _frozen(part)) for key, part in value.items()))
    return value if isinstance(value, Node) else (type(value), value)
