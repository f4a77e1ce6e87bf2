"""Lowered graphs compute the same bits, by torch's bindings."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from hydragrad.hypergradient import lowering
from hydragrad.hypergradient.lowering import lowered

aten = torch.ops.aten


def given(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


X, Y, SQUARE = given(3, 4), given(4, 3), given(4, 4)
IMAGES, KERNEL, IDS = given(2, 3, 5, 5), given(4, 3, 3, 3), torch.tensor([[2, 0, 1], [1, 1, 0]])
# The arguments of each overload as traced graphs give them, beside the elementwise ones of one tensor.
CALLS: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten.add.Scalar: ((X, 2), {"alpha": 3}),
    aten.add.Tensor: ((X, given(4)), {"alpha": -2}),
    aten.addmm.default: ((given(4), SQUARE, SQUARE), {}),
    aten.baddbmm.default: ((given(2, 3, 5), given(2, 3, 4), given(2, 4, 5)), {"alpha": 2}),
    aten.bmm.default: ((given(2, 3, 4), given(2, 4, 5)), {}),
    aten.cat.default: (([X, X + 1], 1), {}),
    aten.convolution.default: ((IMAGES, KERNEL, None, [1, 2], [1, 0], [1, 1], False, [0, 0], 1), {}),
    aten.div.Scalar: ((X, 3), {}),
    aten.div.Tensor: ((X, given(4)), {}),
    aten.expand.default: ((given(4, 1), [2, 4, 3]), {}),
    aten.gather.default: ((SQUARE, 0, IDS), {}),
    aten.index_select.default: ((X, 1, torch.tensor([3, 0, 0])), {}),
    aten.mm.default: ((X, Y), {}),
    aten.mul.Scalar: ((X, -0.5), {}),
    aten.mul.Tensor: ((X, given(3, 1)), {}),
    aten.permute.default: ((IMAGES, [1, 0, 3, 2]), {}),
    aten.pow.Tensor_Scalar: ((X, 3), {}),
    aten.select.int: ((IMAGES, 1, -1), {}),
    aten.squeeze.dim: ((given(3, 1, 4), 1), {}),
    aten.sub.Scalar: ((X, 2), {"alpha": 3}),
    aten.sub.Tensor: ((X, given(4)), {"alpha": 2}),
    aten.sum.default: ((X,), {}),
    aten.sum.dim_IntList: ((IMAGES, [0, -1], True), {}),
    aten.t.default: ((X,), {}),
    aten.transpose.int: ((IMAGES, 1, -1), {}),
    aten.unsqueeze.default: ((X, 1), {}),
    aten.view.default: ((X, [2, -1]), {}),
    aten.where.self: ((X > 0, X, Y.t()), {}),
    aten.zeros.default: (([2, 3],), {"dtype": torch.float64, "device": torch.device("cpu")}),
}
POSITIVE = {aten.log.default, aten.rsqrt.default, aten.sqrt.default}
LOWERED = [*lowering._FUNCTIONS, *lowering._METHODS]


def graph_of(target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[GraphModule, list[Tensor]]:
    """A graph of one call; tensors come in as placeholders."""
    graph, tensors = Graph(), list[Tensor]()

    def placed(value: Any) -> Any:
        if isinstance(value, list):
            return [placed(part) for part in value]
        if not isinstance(value, Tensor):
            return value
        tensors.append(value)
        return graph.placeholder(f"x{len(tensors)}")

    places = [placed(value) for value in args]
    graph.output(graph.call_function(target, tuple(places), kwargs))
    return GraphModule({}, graph), tensors


@pytest.mark.parametrize("target", LOWERED, ids=str)
def test_each_binding_is_its_overload(target: Any) -> None:
    args, kwargs = CALLS.get(target, ((X.abs() if target in POSITIVE else X,), {}))
    module, tensors = graph_of(target, args, kwargs)
    expected = target(*args, **kwargs)
    again = lowered(module)
    assert all(node.target is not target for node in again.graph.nodes)
    found = again(*tensors)
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("function", "kept"),
    [
        (lambda x: aten.sum.dim_IntList(x, [], False), aten.sum.dim_IntList),
        (lambda x: aten.clone.default(x, memory_format=torch.contiguous_format), aten.clone.default),
        (lambda x: aten.sum.dim_IntList(x, [0], dtype=torch.float32), None),
    ],
)
def test_what_a_binding_may_take_otherwise_stays(function: Callable[[Tensor], Tensor], kept: Any) -> None:
    module = lowered(make_fx(function)(X))
    targets = [node.target for node in module.graph.nodes if node.op == "call_function"]
    assert targets == [kept or torch.sum]
    assert torch.equal(module(X), function(X))
