"""Graphs written as sums of scaled tensors and cut in two: the same numbers to rounding, nothing overwritten."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from hydragrad.hypergradient import exact, gauss_newton
from hydragrad.hypergradient.combining import combine
from hydragrad.hypergradient.hoisting import halved
from hydragrad.hypergradient.linear import combined, dependent
from hydragrad.hypergradient.pooling import pooled, unpooled
from hydragrad.hypergradient.simplify import simplified
from hydragrad.hypergradient.tracing import Traced, TracedFunction
from hydragrad.problem import Problem, Reduction
from hydragrad.step.objective import Objective, Point
from tests.tolerances import SAME, assert_close

aten = torch.ops.aten
K = 3


def calls(graph, target) -> list:
    return [node for node in graph.graph.nodes if node.target is target]


def rewritten(function, block: int, *inputs: Tensor):
    graph = simplified(make_fx(function)(*inputs))
    places = [node for node in graph.graph.nodes if node.op == "placeholder"][-block:]
    return combined(graph, places), places


def same_numbers(function, block: int, *inputs: Tensor) -> None:
    graph, _ = rewritten(function, block, *inputs)
    before = [x.clone() for x in inputs]
    for _ in range(2):  # the second call meets whatever the first one wrote
        for found, expected in zip(graph(*inputs), function(*before), strict=True):
            assert_close(found, expected, SAME)
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def test_a_chain_is_one_operation_with_the_factors_taken_together():
    def function(c: Tensor, d: Tensor, x: Tensor) -> list[Tensor]:
        return [-((x * c + x / d) * 0.5 - x.sum((1, 2), keepdim=True) * d)]

    inputs = random(4, 5), random(4, 5) + 3, random(K, 4, 5)
    graph, places = rewritten(function, 1, *inputs)
    assert len(calls(graph, combine)) == 1
    assert not calls(graph, aten.add.Tensor)
    assert places[-1] in dependent(graph.graph, places)
    same_numbers(function, 1, *inputs)


def test_memory_is_taken_over_only_from_what_nobody_needs_any_more():
    def function(w: Tensor, c: Tensor, x: Tensor) -> list[Tensor]:
        made = x @ w  # needed again at the end, through a view
        scaled = made * c
        seen = scaled.view(K, -1)
        other = scaled + x
        fresh = x @ (w + c)
        return [other * c, seen.sum(1), made.transpose(1, 2) @ w, fresh * c - x]

    inputs = random(5, 5), random(5, 5), random(K, 5, 5)
    graph, _ = rewritten(function, 1, *inputs)
    assert [node.args[-1] is True for node in calls(graph, combine)].count(True) == 1
    same_numbers(function, 1, *inputs)


def test_memory_that_an_operation_only_expanded_is_not_taken_over():
    small = random(3, 1)
    x, c = small.expand(3, 4), random(3, 4)
    before = small.clone()
    found = combine(((2.0, x),), c, (), (3, 4), (4, 1), True)  # traced as dense, expanded when it runs
    assert_close(found, 2.0 * before * c, SAME)
    assert torch.equal(small, before)


def test_an_operand_that_comes_twice_is_not_overwritten_before_its_second_time():
    def function(w: Tensor, c: Tensor, x: Tensor) -> list[Tensor]:
        made = x @ w
        return [made * c + made * w + made.transpose(1, 2) * 2.0]

    same_numbers(function, 1, random(5, 5), random(5, 5), random(K, 5, 5))


def test_what_is_returned_and_what_was_given_is_never_written_to():
    def function(c: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
        kept = torch.tanh(c) @ x
        return [kept, kept * c + y, x * c, x - y, kept.view(K, -1)]

    same_numbers(function, 2, random(4, 4), random(K, 4, 4), random(K, 4, 4))


def test_products_of_matrices_are_added_as_they_are_computed():
    def function(w: Tensor, x: Tensor, y: Tensor) -> list[Tensor]:
        return [torch.bmm(x, w) + torch.bmm(y, w) * 2.0 + torch.bmm(w, x)]

    inputs = random(K, 4, 4), random(K, 4, 4), random(K, 4, 4)
    graph, _ = rewritten(function, 2, *inputs)
    assert len(calls(graph, aten.bmm.default)) == 1
    same_numbers(function, 2, *inputs)


def test_a_sum_of_what_is_broadcast_is_the_sum_of_its_factors():
    def function(c: Tensor, d: Tensor, x: Tensor) -> list[Tensor]:
        mean = x.mean((1, 2), keepdim=True)
        centered = (x - mean) * c + mean * d
        wide = (mean * 3.0).expand(K, 4, 5)
        return [centered.sum((1, 2), True), (centered * d).mean((2,), True), wide.sum((1, 2), True)]

    same_numbers(function, 1, random(4, 5), random(5), random(K, 4, 5))
    same_numbers(function, 1, random(4, 1), random(4, 5), random(K, 4, 5))


def test_other_layouts_and_repeated_operands():
    def function(c: Tensor, x: Tensor) -> list[Tensor]:
        turned = x.permute(1, 0, 2)
        return [(turned + turned) * 2.0, (turned * c).contiguous().view(-1), x.expand(K, 4, 5) - x * c[:1]]

    same_numbers(function, 1, random(K, 5), random(K, 4, 5).transpose(0, 1).contiguous().transpose(0, 1))


def test_what_is_no_linear_function_of_the_block_stays_as_it_is():
    def function(c: Tensor, x: Tensor) -> list[Tensor]:
        return [x * x + c, x / x, x + 1.0, torch.where(c > 0, x, c), x * (c > 0), c * 2.0]

    same_numbers(function, 1, random(4, 5), random(K, 4, 5))


@pytest.mark.parametrize("window", [(2, 2), (1, 3), (3, 2)])
def test_pooling_side_by_side_is_torchs_pooling(window):
    def function(c: Tensor, x: Tensor) -> list[Tensor]:
        out = nn.functional.avg_pool2d(x * c, window)
        pull = torch.func.vjp(lambda c: nn.functional.avg_pool2d(c.expand(2 * K, 4, 6, 6), window), c)[1]
        return [out, pull(out)[0]]

    inputs = random(6, 6), random(2 * K, 4, 6, 6)
    graph, _ = rewritten(function, 1, *inputs)
    assert len(calls(graph, pooled)) == len(calls(graph, unpooled)) == 1
    same_numbers(function, 1, *inputs)


@pytest.mark.parametrize("options", [{"stride": 1}, {"padding": 1}, {"ceil_mode": True}, {"divisor_override": 3}])
def test_other_pooling_stays(options):
    def function(x: Tensor) -> list[Tensor]:
        return [nn.functional.avg_pool2d(x, 2, **options), nn.functional.avg_pool2d(x[..., :5], 2)]

    graph, _ = rewritten(function, 1, random(2, 4, 6, 6))
    assert len(calls(graph, aten.avg_pool2d.default)) == 2
    same_numbers(function, 1, random(2, 4, 6, 6))


def test_halves_compute_what_the_whole_does_and_keep_what_the_block_does_not_change():
    def function(w: Tensor, c: Tensor, x: Tensor) -> list[Tensor]:
        return [(x @ torch.tanh(w)) * c.exp(), torch.tanh(w) * 2.0, x]

    inputs = random(5, 5), random(5), random(K, 5, 5)
    graph, places = rewritten(function, 1, *inputs)
    halves = halved(graph, dependent(graph.graph, places))
    assert not calls(halves.block, aten.tanh.default)
    assert not calls(halves.block, aten.exp.default)
    assert halves.held == 8 * (25 + 5 + 25)  # tanh w, exp c, 2 tanh w
    for found, expected in zip(halves(halves.constants(inputs), inputs), function(*inputs), strict=True):
        assert_close(found, expected, SAME)


def test_a_slope_that_two_chains_need_is_computed_once():
    def function(w: Tensor, x: Tensor) -> list[Tensor]:
        y = torch.tanh(w)
        return [aten.tanh_backward.default(x, y), aten.tanh_backward.default(x * 2.0, y)]

    graph, _ = rewritten(function, 1, random(5), random(K, 5))
    assert len(calls(graph, aten.tanh_backward.default)) == 1
    same_numbers(function, 1, random(5), random(K, 5))


def test_large_copies_of_what_is_small_are_made_again():
    def function(c: Tensor, x: Tensor) -> list[Tensor]:
        return [torch.bmm(x, torch.tanh(c).expand(64, 64, 64).clone())]

    inputs = random(64, 64), random(64, 64, 64)
    graph, places = rewritten(function, 1, *inputs)
    halves = halved(graph, dependent(graph.graph, places))
    assert calls(halves.block, aten.clone.default)
    assert halves.held == 8 * 64 * 64


def test_constants_are_those_of_the_point_asked_about():
    def function(w: Tensor, x: Tensor) -> Tensor:
        return x * torch.tanh(w)

    traced = TracedFunction(function, linear=1)
    w, v, x = random(4), random(4), random(K, 4)
    one, other = object(), object()
    for at, weight in ((one, w), (one, w), (other, v), (None, w), (one, w)):
        assert_close(traced(weight, x, at=at), x * torch.tanh(weight), SAME)


def test_a_compiled_graph_is_cut_in_two_as_well(monkeypatch):
    given, whole = [], torch.compile

    def eager(graph, **options):  # what is handed over is what counts here, not how it is compiled
        given.append(graph)
        return whole(graph, backend="eager", **options)

    def function(w: Tensor, x: Tensor) -> Tensor:
        return x @ torch.tanh(w) * w

    monkeypatch.setattr(torch, "compile", eager)
    traced = TracedFunction(function, compile=True, linear=1)
    w, v, x = random(4, 4), random(4, 4), random(K, 4, 4)
    one, other = object(), object()
    for at, weight in ((one, w), (one, w), (other, v)):
        assert_close(traced(weight, x, at=at), function(weight, x), SAME)
    assert len(given) == 1
    assert not calls(given[0], aten.tanh.default)


ACTIVATIONS = [nn.Tanh(), nn.Sigmoid(), nn.GELU(), nn.GELU("tanh"), nn.SiLU(), nn.ELU(), nn.Softplus(), nn.LeakyReLU()]
ACTIVATIONS += [nn.ReLU(), nn.Hardtanh(), nn.Mish(), nn.SELU(), nn.Softsign()]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=repr)
def test_products_through_every_activation(activation):
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), activation, nn.AvgPool2d(2), nn.Flatten(), activation, nn.Linear(16, 3)
    ).double()
    check(model)


def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")


def check(model: nn.Module) -> None:
    names = [name for name, _ in model.named_parameters()]
    carried = [name for name, b in model.named_buffers() if b.is_floating_point()]
    counters = [name for name, b in model.named_buffers() if not b.is_floating_point()]
    objective = Objective(Problem(model, loss, [], Reduction(), list), model, names, carried, counters)
    batch = random(5, 2, 6, 6), torch.randint(0, 3, (5,))
    buffers = dict(model.named_buffers())
    rest = {name: buffers[name] for name in counters}
    values = tuple(p.detach() for p in model.parameters()), tuple(buffers[name] for name in carried)
    point = Point(values[0], rest, batch, torch.rand(5).double(), torch.rand(5).double(), values[1])
    gam, bet = (tuple(random(K, *x.shape) for x in given) for given in values)
    for made, plain in (
        (exact.ForwardOverReverse, exact.DoubleBackward),
        (exact.ReverseOverReverse, exact.DoubleBackward),
        (gauss_newton.JvpThenVjp, gauss_newton.DoubleVjp),
    ):
        engine, before = Traced(made(objective)), [x.clone() for x in (*gam, *bet)]
        expected = plain(objective).products(point, gam, bet)
        for _ in range(2):
            curved, terms, back = engine.products(point, gam, bet)
            assert curved is not None
            assert expected[0] is not None
            for x, y in zip((*curved, terms, *back), (*expected[0], expected[1], *expected[2]), strict=True):
                assert_close(x, y, SAME)
        assert all(torch.equal(a, b) for a, b in zip((*gam, *bet), before, strict=True))
