"""Simplified graphs: fewer operations, the same numbers bit for bit."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hydragrad.hypergradient.simplify import simplified

aten = torch.ops.aten


def targets(graph) -> list:
    return [node.target for node in graph.graph.nodes if node.op == "call_function"]


def network(params: tuple[Tensor, ...], x: Tensor) -> Tensor:
    hidden = torch.tanh(nn.functional.linear(x, params[0], params[1]))
    return nn.functional.log_softmax(nn.functional.linear(hidden, params[2]), 1).square().sum(1)


def tangents_and_gradients(params: tuple[Tensor, ...], x: Tensor, vectors: tuple[Tensor, ...]) -> tuple:
    """A jvp and a vjp of one function: its forward pass is traced twice, and the tangent of x as zeros."""
    along = torch.func.vmap(lambda v: torch.func.jvp(lambda p: network(p, x), (params,), (v,))[1])(vectors)
    out, pull, *_ = torch.func.vjp(lambda p: network(p, x), params)
    return along, pull(torch.ones_like(out))[0]


@pytest.fixture
def inputs() -> tuple:
    torch.manual_seed(0)
    params = (torch.randn(5, 4), torch.randn(5), torch.randn(3, 5))
    return params, torch.randn(7, 4), tuple(torch.randn(6, *p.shape) for p in params)


def test_nothing_is_computed_twice_and_the_numbers_stay(inputs):
    plain = make_fx(torch.func.functionalize(tangents_and_gradients))(*inputs)
    before = targets(plain).count(aten.tanh.default)
    slim = simplified(make_fx(torch.func.functionalize(tangents_and_gradients))(*inputs))
    assert before == 2
    assert targets(slim).count(aten.tanh.default) == 1
    assert aten.alias.default not in targets(slim)
    assert len(targets(slim)) < 0.7 * len(targets(plain))
    (along, pulled), (along_slim, pulled_slim) = plain(*inputs), slim(*inputs)
    assert torch.equal(along, along_slim)
    assert all(torch.equal(a, b) for a, b in zip(pulled, pulled_slim, strict=True))


def test_products_with_zeros_go(inputs):
    def function(a: Tensor, b: Tensor) -> Tensor:
        return a @ b + torch.zeros(4, 4).expand(4, 4) @ b + torch.zeros(4, 4)

    a, b = torch.randn(4, 4), torch.randn(4, 4)
    slim = simplified(make_fx(function)(a, b))
    assert targets(slim) == [aten.mm.default]
    assert torch.equal(slim(a, b), a @ b)


def test_a_sum_with_zeros_stays_where_it_changes_shape_or_type():
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        return a + torch.zeros(3, 4), a + torch.zeros(4, dtype=torch.float64)

    a = torch.randn(4)
    wide, precise = simplified(make_fx(function)(a))(a)
    assert wide.shape == (3, 4)
    assert precise.dtype == torch.float64


def test_random_numbers_are_drawn_as_often_as_before():
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        return a * torch.rand_like(a), a * torch.rand_like(a)

    first, second = simplified(make_fx(function)(torch.ones(4)))(torch.ones(4))
    assert not torch.equal(first, second)


def test_numbers_of_another_type_are_not_the_same_number():
    def function(a: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full_like(a, 1, dtype=torch.float64), torch.full_like(a, True, dtype=torch.int64)

    one, true = simplified(make_fx(function)(torch.ones(4)))(torch.ones(4))
    assert one.dtype == torch.float64
    assert true.dtype == torch.int64


def test_a_graph_that_changes_tensors_in_place_is_left_alone():
    def function(a: Tensor) -> Tensor:
        b = a + 0.0
        c = b * 2.0
        b.add_(1.0)
        return c + b * 2.0

    a = torch.randn(4)
    graph = make_fx(function)(a)
    before = targets(graph)
    assert targets(simplified(graph)) == before
    assert torch.equal(graph(a), a * 2.0 + (a + 1.0) * 2.0)
