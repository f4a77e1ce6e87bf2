"""Sums of scaled tensors in few passes over memory, in place where what was there is not needed any more."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from hydragrad.hypergradient.simplify import value_of

aten = torch.ops.aten

_MAY_SHARE = {aten._unsafe_view.default, aten.reshape.default, aten.contiguous.default, aten.to.dtype}
"""Operations that may return their input's memory, though their schema does not say so."""

Summand = Tensor | tuple[Tensor, Tensor]


def combine(
    first: Sequence[tuple[float, Summand]],
    factor: Tensor | None,
    rest: Sequence[tuple[float, Tensor, Tensor | None]],
    shape: Sequence[int],
    stride: Sequence[int],
    reuse: bool = False,
) -> Tensor:
    """``factor * sum(a x for a, x in first) + sum(a x c for a, x, c in rest)``, broadcast to ``shape``.

    A pair (A, B) among ``first`` stands for its batched matrix product. ``reuse``: the sum may take the memory of the
    first x, if that has the shape and strides asked for.
    Example: ``combine(((1.0, x), (2.0, y)), None, (), (3,), (1,))`` is x + 2 y.
    """
    (number, x), *others = first
    assert isinstance(x, Tensor)
    if reuse and x.shape == torch.Size(shape) and x.stride() == tuple(stride):  # not what an operation only expanded
        out = x if number == 1.0 else x.mul_(number)
    else:
        out = x.new_empty_strided(shape, stride)
        if not others and factor is not None and number == 1.0:
            torch.mul(x, factor, out=out)
            factor = None
        elif others and number == 1.0 and isinstance(others[0][1], Tensor):
            torch.add(x, others[0][1], alpha=others[0][0], out=out)
            others = others[1:]
        else:
            out = torch.mul(x, number, out=out) if x.shape == out.shape else out.copy_(x).mul_(number)
    for number, y in others:
        if isinstance(y, Tensor):
            out.add_(y, alpha=number)
        else:
            out.baddbmm_(*y, alpha=number)
    if factor is not None:
        out.mul_(factor)
    for number, y, c in rest:
        if c is None:
            out.add_(y, alpha=number)
        else:
            out.addcmul_(y, c, value=number)
    return out


def reuse_memory(graph: Graph, varying: set[Node]) -> None:
    """Let every ``combine`` work in place where it can, and add matrix products as they are computed."""
    for node in graph.nodes:
        if node.target is combine:
            _fold_products(node)
    graph.eliminate_dead_code()
    place = {node: k for k, node in enumerate(graph.nodes)}
    roots = _roots(graph)
    last: dict[Node, int] = {}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            last[roots[source]] = max(last.get(roots[source], 0), place[node])
    for node in graph.nodes:
        if node.target is not combine:
            continue
        sources: list[Node] = []  # an operand may come twice
        map_arg(node.args, lambda source, into=sources: into.append(roots[source]))

        def free(x: Any, at: Node = node, sources: list[Node] = sources) -> bool:
            if not isinstance(x, Node) or x not in varying or not _fits(x, at):
                return False
            root = roots[x]
            fresh = root.op == "call_function" and root in varying
            return fresh and last[root] == place[at] and sources.count(root) == 1

        _take(node, free)


def _take(node: Node, free: Any) -> None:
    """Put what may be overwritten first, if anything may."""
    first, factor, rest, *form = node.args
    for k, (_, x) in enumerate(first):  # type: ignore[arg-type]
        if free(x):
            node.args = ((first[k], *first[:k], *first[k + 1 :]), factor, rest, *form, True)  # type: ignore[index,misc]
            return
    if len(first) > 1 or not isinstance(first[0][1], Node):  # type: ignore[arg-type,index]
        return
    number, x = first[0]  # type: ignore[index,misc]
    for k, (scale, y, c) in enumerate(rest):  # type: ignore[arg-type]
        if free(y):
            others = (*rest[:k], (number, x, factor), *rest[k + 1 :])  # type: ignore[index,misc]
            node.args = (((scale, y),), c, others, *form, True)
            return


def _fits(x: Node, node: Node) -> bool:
    a, b = value_of(x), value_of(node)
    if a is None or b is None or a.dtype != b.dtype:
        return False
    dense = all(step or size == 1 for step, size in zip(b.stride(), b.shape, strict=True))
    return dense and a.shape == b.shape and a.stride() == b.stride()


def _fold_products(node: Node) -> None:
    """Batched matrix products that nothing else needs are added by the product itself."""
    first, *others = node.args
    value = value_of(node)
    if len(first) < 2 or value is None or value.dim() != 3:  # type: ignore[arg-type]
        return
    folds = [_only_product(x, node) for _, x in first]  # type: ignore[union-attr]
    whole = [k for k, fold in enumerate(folds) if not fold and _fits(first[k][1], node)]  # type: ignore[index]
    head = whole[0] if whole else 0
    order = [head, *(k for k in range(len(folds)) if k != head)]
    summands = [(first[k][0], first[k][1].args if folds[k] and k != head else first[k][1]) for k in order]  # type: ignore[index]
    node.args = (tuple((number, tuple(x) if isinstance(x, Sequence) else x) for number, x in summands), *others)


def _only_product(x: Node, user: Node) -> bool:
    return x.target is aten.bmm.default and list(x.users) == [user]


def _roots(graph: Graph) -> dict[Node, Node]:
    """For every node the one whose memory it may share."""
    roots: dict[Node, Node] = {}
    for node in graph.nodes:
        sources = node.all_input_nodes
        roots[node] = roots[sources[0]] if sources and _shares(node) else node
    return roots


def _shares(node: Node) -> bool:
    if getattr(node.target, "__name__", "") == "getitem":
        return _shares(node.all_input_nodes[0])
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    arguments = node.target._schema.arguments
    return node.target in _MAY_SHARE or any(argument.alias_info is not None for argument in arguments)
