"""Losses that call torch.autograd.grad: everywhere they run, gradients are on."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import hydragrad as hg
from tests.hypergradient.recorded import recipe_of, recorded, values
from tests.oracles import unroll
from tests.tolerances import ORACLE, assert_close
from tests.zoo import Case, case, seeded

EPOCHS = [[[[0, 1, 2], [3, 4]], [[5, 6], [7, 5, 8]], [[9, 1], [10, 11]]]]


def penalized(model: Callable[..., Tensor], batch: Any) -> Tensor:
    """Cross-entropy, and the slope of the outputs along the inputs."""
    inputs = batch[0].clone().requires_grad_()
    outputs = model(inputs)
    (slopes,) = torch.autograd.grad(outputs.sum(), inputs, create_graph=True)
    return F.cross_entropy(outputs, batch[1], reduction="none") + 0.3 * slopes.square().sum(1)


def problem_of(name: str) -> Case:
    return replace(case(name), loss=seeded(penalized) if name == "dropout" else penalized)


@pytest.mark.parametrize("name", ["mlp_tanh", "batchnorm", "dropout"])
def test_a_gradient_penalty_is_exact(name: str, tmp_path: Path) -> None:
    problem = problem_of(name)
    recipe = recipe_of(problem, steps=EPOCHS[0])
    run = recorded(recipe, tmp_path / "run", EPOCHS)
    with torch.no_grad():  # a caller's own
        found = values(run, problem.queries)
    assert_close(found, unroll(recipe).scores(problem.queries), ORACLE)
    assert hg.attribute(run, problem.queries, progress=False).diagnostics.derivative_error is not None


def test_it_has_no_gauss_newton_form(tmp_path: Path) -> None:
    problem = problem_of("mlp_tanh")
    run = recorded(recipe_of(problem), tmp_path / "run")
    with pytest.raises(hg.UnsupportedError, match=r"no Gauss-Newton form.*differentiates the model by itself.*'exact'"):
        hg.attribute(run, problem.queries, method="gauss-newton", progress=False)
