"""Traced graphs of engines as linear maps: chains of elementwise operations become sums of scaled tensors.

What an engine computes is linear in its block of vectors. Forward and reverse mode say so in many small operations
(scale, add, subtract a mean), each a pass over ``[K, b, ...]`` in memory, and memory is what bounds them. Here a chain
is first written as ``sum_n a_n c_n x_n`` with numbers a, factors c that do not depend on the block, and tensors x of
the block that something else than an elementwise operation made; then it takes as few passes as it has terms.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from hydragrad.hypergradient.combining import combine, reuse_memory
from hydragrad.hypergradient.pooling import rewrite_pooling
from hydragrad.hypergradient.simplify import changes_in_place, key_of, value_of

aten = torch.ops.aten

_SCALED = {
    aten.tanh_backward.default,
    aten.sigmoid_backward.default,
    aten.gelu_backward.default,
    aten.silu_backward.default,
    aten.elu_backward.default,
    aten.softplus_backward.default,
    aten.leaky_relu_backward.default,
    aten.threshold_backward.default,
    aten.hardtanh_backward.default,
}
"""Derivatives of activations: the first argument times a factor of the others."""
_SMALLER = 4
"""A factor that leaves its product with a small tensor this many times below full size is taken into the product."""


@final
@dataclass(frozen=True)
class Term:
    """``number * product of factors * basis``, broadcast."""

    basis: Node
    factors: tuple[Node, ...] = ()
    number: float = 1.0

    def times(self, number: float, *factors: Node) -> "Term":
        return Term(self.basis, (*self.factors, *factors), self.number * number)


def dependent(graph: Graph, block: Sequence[Node]) -> set[Node]:
    """The nodes that depend on one of ``block``."""
    found = set(block)
    for node in graph.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def combined(module: GraphModule, block: Sequence[Node]) -> GraphModule:
    """The same function to rounding, linear in the placeholders ``block``, with fewer passes over memory."""
    if changes_in_place(module):
        return module
    varying = dependent(module.graph, block)
    rewrite_pooling(module.graph, varying)
    _Combining(module.graph, varying).run()
    reuse_memory(module.graph, dependent(module.graph, block))
    module.graph.lint()
    module.recompile()
    return module


@final
class _Combining:
    """Goes through a graph once. ``forms``: nodes not computed yet, as sums of terms."""

    def __init__(self, graph: Graph, varying: set[Node]) -> None:
        self.graph, self.varying = graph, varying
        self.forms: dict[Node, list[Term]] = {}
        self.products: dict[tuple[Node, ...], Node] = {}
        self.made: dict[Any, Node] = {}

    def run(self) -> None:
        for node in list(self.graph.nodes):
            if node not in self.varying or node.op == "placeholder":
                continue
            form = None
            if node.op == "call_function" and value_of(node) is not None:
                with self.graph.inserting_before(node):
                    form = self._form(node)
            if form is None:
                for source in node.all_input_nodes:
                    if source in self.forms:
                        self._compute(source)
            else:
                self.forms[node] = form
        _sort(self.graph)
        self.graph.eliminate_dead_code()

    # ---- what a node is, as a sum of terms

    def _form(self, node: Node) -> list[Term] | None:
        """None: not an elementwise linear operation, or a sum over dimensions."""
        target, args = node.target, node.args
        if not self._plain(node):
            return None
        if target in (aten.add.Tensor, aten.sub.Tensor) and all(self._aligned(a, node) for a in args[:2]):
            sign = float(node.kwargs.get("alpha", 1)) * (1 if target is aten.add.Tensor else -1)  # type: ignore[arg-type]
            return [*self._terms(args[0]), *(t.times(sign) for t in self._terms(args[1]))]
        if target in (aten.sum.dim_IntList, aten.mean.dim):
            return self._reduced(node)
        if target is aten.copy.default and self._aligned(args[1], node) and self._overwrites(args[0], args[1]):
            return self._terms(args[1])
        if not args or not self._aligned(args[0], node):
            swapped = target is aten.mul.Tensor and self._aligned(args[1], node)
            return self._scaled(node, args[1], args[0]) if swapped else None
        if target is aten.neg.default:
            return [t.times(-1.0) for t in self._terms(args[0])]
        if target in (aten.expand.default, aten.clone.default):
            return self._terms(args[0])
        if target in (aten.mul.Tensor, aten.mul.Scalar):
            return self._scaled(node, args[0], args[1])
        if target in (aten.div.Tensor, aten.div.Scalar):
            divisor = args[1]
            if isinstance(divisor, Node):
                if divisor in self.varying or value_of(divisor) is None:
                    return None
                divisor = self._call(aten.reciprocal.default, (_unexpanded(divisor),))
                return self._scaled(node, args[0], divisor)
            return self._scaled(node, args[0], 1.0 / divisor) if divisor else None  # type: ignore[operator]
        if target in _SCALED and not any(source in self.varying for source in node.all_input_nodes[1:]):
            others = [_unexpanded(a) for a in args[1:]]
            at = next(a for a in others if isinstance(a, Node))
            slope = self._call(target, (self._call(aten.ones_like.default, (at,)), *others), node.kwargs)
            return self._scaled(node, args[0], slope)
        return None

    def _scaled(self, node: Node, x: Any, factor: Any) -> list[Term] | None:
        if not isinstance(factor, Node):
            return [t.times(float(factor)) for t in self._terms(x)]
        value = value_of(factor)
        if factor in self.varying or value is None or value.dtype != _known(node).dtype:
            return None
        return [t.times(1.0, _unexpanded(factor)) for t in self._terms(x)]

    def _reduced(self, node: Node) -> list[Term] | None:
        """A sum over dimensions: where the basis is broadcast along them, the sum of its factors alone."""
        x, dims = node.args[0], node.args[1]
        keep = len(node.args) > 2 and node.args[2]
        if not isinstance(x, Node) or x not in self.forms or not keep or not self._plain(x) or node.kwargs or not dims:
            return None
        shape = _known(x).shape
        summed = [d % len(shape) for d in dims]  # type: ignore[union-attr]
        number = 1.0 / math.prod(shape[d] for d in summed) if node.target is aten.mean.dim else 1.0
        small, large = [], []
        for term in self._terms(x):
            broadcast = all(_known(term.basis).shape[d] == 1 for d in summed)
            (small if broadcast and _known(term.basis).shape != shape else large).append(term)
        if not small:
            return None
        form = [self._summed(term, shape, summed).times(number) for term in small]
        if large:
            whole = self._materialized(large, _known(x))
            form.append(Term(self._call(aten.sum.dim_IntList, (whole, list(summed), True)), (), number))
        return form

    def _summed(self, term: Term, shape: Sequence[int], dims: list[int]) -> Term:
        count = math.prod(shape[d] for d in dims)
        if not term.factors:
            return term.times(float(count))
        factor = self._product(term.factors)
        own = (1,) * (len(shape) - _known(factor).dim()) + tuple(_known(factor).shape)
        factor = self._call(aten.expand.default, (factor, list(own)))
        present = [d for d in dims if own[d] > 1]
        if present:
            factor = self._call(aten.sum.dim_IntList, (factor, present, True))
        return Term(term.basis, (factor,), term.number * count / math.prod(own[d] for d in dims))

    def _terms(self, x: Any) -> list[Term]:
        """The terms of an argument; what has several and is asked for more than once is computed, once."""
        form = self.forms.get(x)
        if form is None:
            return [Term(x)]
        if len(form) > 1 and len(x.users) > 1:
            return [Term(self._compute(x))]
        return form

    # ---- computing a sum of terms

    def _compute(self, node: Node) -> Node:
        form = self.forms.pop(node)
        if node.target is aten.expand.default:  # a view, of what it expands
            for source in node.all_input_nodes:
                if source in self.forms:
                    self._compute(source)
            return node
        with self.graph.inserting_before(node):
            made = self._materialized(form, _known(node))
        node.replace_all_uses_with(made)
        return made

    def _materialized(self, form: list[Term], like: Tensor) -> Node:
        groups: dict[Node | None, list[tuple[float, Node]]] = {}
        for term in form:
            if _known(term.basis).numel() == like.numel():
                key = self._product(term.factors) if term.factors else None
                groups.setdefault(key, []).append((term.number, term.basis))
        for key, small in self._small(form, like).items():
            groups.setdefault(key, []).append((1.0, small))
        if list(groups) == [None] and len(groups[None]) == 1:
            number, basis = groups[None][0]
            if number == 1.0 and _same(_known(basis), like):
                return basis
        chosen = max(groups, key=lambda key: sum(_known(x).numel() == like.numel() for _, x in groups[key]))
        first = sorted(groups.pop(chosen), key=lambda pair: -_known(pair[1]).numel())
        rest = [(number, x, key) for key, members in groups.items() for number, x in members]
        made = self.graph.call_function(
            combine, (tuple(first), chosen, tuple(rest), tuple(like.shape), tuple(like.stride()))
        )
        made.meta["val"] = like
        self.varying.add(made)
        return made

    def _small(self, form: list[Term], like: Tensor) -> dict[Node | None, Node]:
        """Terms whose basis is broadcast, summed where they share the factors that make them full."""
        sums: dict[Node | None, Node] = {}
        for term in form:
            if _known(term.basis).numel() == like.numel():
                continue
            x, wide = term.basis, []
            for factor in sorted(term.factors, key=lambda f: _known(f).numel()):
                shape = torch.broadcast_shapes(_known(x).shape, _known(factor).shape)
                if math.prod(shape) * _SMALLER <= like.numel():
                    x = self._call(aten.mul.Tensor, (x, factor))
                else:
                    wide.append(factor)
            if term.number != 1.0:
                x = self._call(aten.mul.Scalar, (x, term.number))
            key = self._product(tuple(wide)) if wide else None
            sums[key] = self._call(aten.add.Tensor, (sums[key], x)) if key in sums else x
        return sums

    def _product(self, factors: tuple[Node, ...]) -> Node:
        """A product of what does not depend on the block: computed once for all blocks."""
        key = tuple(sorted(factors, key=lambda f: f.name))
        if len(key) == 1:
            return key[0]
        if key not in self.products:
            self.products[key] = self._call(aten.mul.Tensor, (self._product(key[:-1]), key[-1]))
        return self.products[key]

    def _call(self, target: Any, args: tuple[Any, ...], kwargs: Any = None) -> Node:
        """A new node, or the one that was made for the same call before."""
        key = key_of(target, args, dict(kwargs or {}))
        if key not in self.made:
            self.made[key] = self._new(target, args, kwargs)
        return self.made[key]

    def _new(self, target: Any, args: tuple[Any, ...], kwargs: Any) -> Node:
        node = self.graph.call_function(target, args, dict(kwargs or {}))
        values = map_arg((args, dict(kwargs or {})), _shadow)
        with torch.no_grad():
            node.meta["val"] = target(*values[0], **values[1])
        if any(source in self.varying for source in node.all_input_nodes):
            self.varying.add(node)
        return node

    def _overwrites(self, into: Any, x: Any) -> bool:
        """A copy into a tensor of the same shape, whatever was in it, is what is copied, laid out like the tensor."""
        return isinstance(into, Node) and self._plain(into) and _known(into).shape == _known(x).shape

    def _plain(self, node: Node) -> bool:
        value = value_of(node)
        return value is not None and value.dtype in (torch.float32, torch.float64) and value.layout is torch.strided

    def _aligned(self, x: Any, node: Node) -> bool:
        """Depends on the block and has its dimensions where the result has them."""
        if not isinstance(x, Node) or x not in self.varying or not self._plain(x):
            return False
        return _known(x).dim() == _known(node).dim() and _known(x).dtype == _known(node).dtype


def _known(node: Node) -> Tensor:
    value = value_of(node)
    assert value is not None
    return value


def _shadow(node: Node) -> Tensor:
    """A tensor of the same form on no device."""
    value = _known(node)
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.stride() == b.stride()


def _unexpanded(node: Any) -> Any:
    while isinstance(node, Node) and node.target is aten.expand.default:
        node = node.args[0]
    return node


def _sort(graph: Graph) -> None:
    """Every node behind what it needs, otherwise as they are: what does not depend on the block came in anywhere."""
    order: dict[Node, None] = {}

    def place(node: Node) -> None:
        waiting = [node]
        while waiting:
            missing = [source for source in waiting[-1].all_input_nodes if source not in order]
            if missing:
                waiting += missing
            else:
                order.setdefault(waiting.pop())

    for node in list(graph.nodes):
        place(node)
    last: Node | None = None
    for node in order:
        if last is not None:
            last.append(node)
        last = node
