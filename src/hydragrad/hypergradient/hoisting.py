"""A traced graph cut in two: what depends on the point alone, once a step, and what every block of vectors needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from hydragrad.hypergradient.simplify import value_of

aten = torch.ops.aten

_BLOWN_UP = 2**20
"""Bytes from which a copy that is larger than what it copies is made again for every block rather than kept."""
_COPIES = {aten.clone.default, aten.copy.default, aten._to_copy.default, aten.reshape.default}


@final
@dataclass(frozen=True)
class Halves:
    """``block(*point(*fixed), *given)``: ``fixed``, ``given`` say which inputs of the whole graph each half takes."""

    point: Any
    block: Any
    fixed: tuple[int, ...]
    given: tuple[int, ...]
    held: int

    def constants(self, tensors: Sequence[Tensor]) -> tuple[Any, ...]:
        """What every block at this point needs."""
        return tuple(self.point(*[tensors[k] for k in self.fixed]))

    def __call__(self, constants: Sequence[Any], tensors: Sequence[Tensor]) -> Any:
        return self.block(*constants, *[tensors[k] for k in self.given])


def halved(module: GraphModule, varying: set[Node]) -> Halves:
    """Cut the graph at what does not depend on ``varying`` but is needed with it; ``held``: bytes that this keeps."""
    nodes = list(module.graph.nodes)
    inputs = [node for node in nodes if node.op == "placeholder"]
    output = next(node for node in nodes if node.op == "output")
    again = _again(nodes, varying)
    later = {node for node in nodes if node in varying or node in again} | {output}
    needed = {source for node in later for source in node.all_input_nodes if source not in later}
    kept = [node for node in nodes if node in needed]
    point, block = Graph(), Graph()
    early: dict[Node, Node] = {}
    for node in nodes:
        if node not in later:
            early[node] = point.node_copy(node, early.__getitem__)
    point.output(tuple(early[node] for node in kept))
    late = {node: block.placeholder(f"kept_{node.name}") for node in kept}
    for node in nodes:
        if node in later:
            late[node] = block.node_copy(node, late.__getitem__)
    point.eliminate_dead_code()
    return Halves(
        GraphModule(module, point),
        GraphModule(module, block),
        tuple(k for k, node in enumerate(inputs) if node not in later),
        tuple(k for k, node in enumerate(inputs) if node in later),
        sum(_nbytes(node) for node in kept if node.op != "placeholder"),
    )


def _again(nodes: Sequence[Node], varying: set[Node]) -> set[Node]:
    """What is cheap to make and large to keep: copies of expanded tensors, tensors of zeros; and views of those."""
    found: set[Node] = set()
    for node in nodes:
        if node in varying or node.op != "call_function":
            continue
        value, sources = value_of(node), node.all_input_nodes
        grown = value is not None and value.nbytes > _BLOWN_UP and _nbytes(node) > 2 * sum(map(_nbytes, sources))
        if any(source in found for source in sources) or (grown and (not sources or node.target in _COPIES)):
            found.add(node)
    return found


def _nbytes(node: Node) -> int:
    value = value_of(node)
    if value is None:
        return 0
    spread = [size for size, step in zip(value.shape, value.stride(), strict=True) if step]
    return torch.Size(spread).numel() * value.element_size()
