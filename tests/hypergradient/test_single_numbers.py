"""Parameters and buffers that are single numbers: learned temperatures, gates."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hydragrad as hg
from hydragrad import baselines
from tests.hypergradient.recorded import recipe_of, recorded, values
from tests.oracles import Clip, recursion, unroll
from tests.tolerances import ORACLE, assert_close
from tests.zoo import N_TRAIN, case

PLAIN = case("mlp_tanh")


class Tempered(nn.Module):
    """A linear model whose outputs are divided by a learned temperature."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layer = nn.Linear(4, 3)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) / self.temperature


def tempered(optimizer: str = "SGD", **more: Any) -> Any:
    names = ["layer.weight", "layer.bias", "temperature"]
    hyper = {"lr": 0.05, "momentum": 0.9} if optimizer == "SGD" else {"lr": 0.02, "eps": 1e-3}
    return replace(recipe_of(PLAIN, optimizer, hyper, **more), model=Tempered().double(), groups=[(names, hyper)])


@pytest.mark.parametrize("method", ["exact", "gauss-newton", "hessian-free"])
@pytest.mark.parametrize(
    "recipe",
    [tempered(), tempered("Adam"), tempered(clip=0.2), tempered(clip=[Clip(0.05, None), Clip(0.1)])],
    ids=["SGD", "Adam", "clipped by norm", "by value and norm"],
)
def test_a_learned_temperature(recipe: Any, method: str, tmp_path: Path) -> None:
    run = recorded(recipe, tmp_path / "run")
    dense = unroll(recipe) if method == "exact" else recursion(recipe, method)
    expected = dense.scores(PLAIN.queries)
    for block in (None, 1, 3):
        assert_close(values(run, PLAIN.queries, method, block=block), expected, ORACLE)
    if method != "gauss-newton":
        vectors = hg.hypergradients(run, range(N_TRAIN), method=method, progress=False)
        assert_close(vectors.scores(PLAIN.queries).values, expected, ORACLE)


def test_its_part_in_a_product_of_gradients(tmp_path: Path) -> None:
    recipe = tempered()
    run = recorded(recipe, tmp_path / "run")
    found = baselines.gradient_dot(run, PLAIN.queries).values
    model = Tempered().double()
    model.load_state_dict(run.replay().params)

    def slopes(data: Any) -> Tensor:
        rows = []
        for x, y in data:
            each = torch.autograd.grad(PLAIN.loss(model, (x[None], y[None]))[0], list(model.parameters()))
            rows.append(torch.cat([g.flatten() for g in each]))
        return torch.stack(rows)

    assert_close(found, slopes(run.problem.data) @ slopes(PLAIN.queries).T, ORACLE)
