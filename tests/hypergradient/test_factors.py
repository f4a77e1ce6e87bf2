"""Gradients of linear layers as outer products: against autograd example by example, and scaled in every way."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hydragrad.hypergradient import factors
from hydragrad.hypergradient.factors import terms_of, whole
from hydragrad.hypergradient.tracing import TracedFunction
from tests.tolerances import ORACLE, SAME, assert_close

B, M, N, K = 5, 7, 4, 3
USES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linear": lambda x, w: F.linear(x, w),
    "product": lambda x, w: x @ w.T,
    "transposed": lambda x, w: (w @ x.T).T,
    "turned": lambda x, w: F.linear(x, w.T),
    "inputs first": lambda x, w: x @ w,
}
SHAPES = {"turned": (N, M), "inputs first": (N, M)}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def losses(use: Callable[[Tensor, Tensor], Tensor], w: Tensor, x: Tensor) -> Tensor:
    """One number for every row of x."""
    return use(torch.sin(x), w).tanh().square().flatten(1).sum(1)


def each(use: Callable[[Tensor, Tensor], Tensor], w: Tensor, x: Tensor) -> Tensor:
    """Per-example gradients through vmap, as the engine takes them."""
    one = torch.func.grad(lambda w, row: losses(use, w, row.unsqueeze(0))[0])
    return torch.func.vmap(one, in_dims=(None, 0))(w, x)


@pytest.mark.parametrize("name", USES)
def test_a_linear_layers_gradients_come_as_factors_that_are_those_of_autograd(name: str) -> None:
    m, n = SHAPES.get(name, (M, N))
    w, x = torch.randn(m, n, dtype=torch.float64), torch.randn(B, N, dtype=torch.float64)
    found = TracedFunction(lambda w, x: each(USES[name], w, x), outer=True)(w, x)
    assert isinstance(found, tuple)
    assert [f.shape for f in found] == [(B, m, 1), (B, 1, n)]
    leaf = w.clone().requires_grad_()
    by_hand = [torch.autograd.grad(losses(USES[name], leaf, x[i : i + 1]).sum(), leaf)[0] for i in range(B)]
    assert_close(whole(found), torch.stack(by_hand), ORACLE)


@pytest.mark.parametrize(
    "turn", [lambda x: x.transpose(1, 2), lambda x: x.permute(0, 2, 1), lambda x: x.transpose(0, 1)]
)
def test_a_product_that_is_turned_comes_as_turned_factors(turn: Callable[[Tensor], Tensor]) -> None:
    """And one whose examples no longer come first is written out."""
    left, right = torch.randn(B, M, 1, dtype=torch.float64), torch.randn(B, 1, N, dtype=torch.float64)
    found = TracedFunction(lambda x, y: turn(torch.bmm(x, y)), outer=True)(left, right)
    assert isinstance(found, Tensor) == (turn(torch.empty(B, M, N)).shape[0] != B)
    assert torch.equal(whole(found), turn(torch.bmm(left, right)))


def test_sums_over_positions_are_no_outer_products() -> None:
    w, x = torch.randn(M, N, dtype=torch.float64), torch.randn(B, 2, N, dtype=torch.float64)
    found = TracedFunction(lambda w, x: each(F.linear, w, x), outer=True)(w, x)
    assert isinstance(found, Tensor)
    assert_close(found, each(F.linear, w, x), ORACLE)


@pytest.mark.parametrize("chunk", [1, 2 * B * N, 3 * B * N, 2**17])
@pytest.mark.parametrize("scaled", ["elementwise", "number", "zero"])
@pytest.mark.parametrize("written", ["outer product", "written out"])
def test_terms_are_sums_over_all_elements(
    written: str, scaled: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(factors, "_CHUNK", chunk)
    left, right = torch.randn(B, M, 1, dtype=torch.float64), torch.randn(B, 1, N, dtype=torch.float64)
    gradients, directions = torch.bmm(left, right), torch.randn(K, M, N, dtype=torch.float64)
    scale: Tensor | float = {"elementwise": torch.randn(M, N, dtype=torch.float64), "number": -0.3, "zero": 0.0}[scaled]
    expected = torch.einsum("imn,mn,kmn->ki", gradients, scale * torch.ones(M, N, dtype=torch.float64), directions)
    found = terms_of((left, right) if written == "outer product" else gradients, scale, directions)
    assert_close(found, expected, SAME)


def test_a_second_form_of_batch_is_traced_and_compared_too() -> None:
    layer = nn.Linear(N, M).double()
    function = TracedFunction(lambda w, x: each(F.linear, w, x), outer=True)
    weight = layer.weight.detach()
    for count in (B, B + 1):
        x = torch.randn(count, N, dtype=torch.float64)
        found = [function(weight, x) for _ in range(101)][-1]
        assert isinstance(found, tuple)
        assert_close(whole(found), each(F.linear, weight, x), SAME)
