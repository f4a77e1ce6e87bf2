"""Runs whose steps drew random numbers, recorded in a plain loop: the scores are derivatives with the same ones."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import hydragrad as hg
from tests.hypergradient.recorded import recipe_of, recorded, values
from tests.oracles import Recipe, finite_differences
from tests.tolerances import FINITE_DIFFERENCE, ORACLE, assert_close
from tests.zoo import N_TRAIN, case

PROBLEM = case("mlp_tanh")


def noisy(model: Any, batch: Any) -> Tensor:
    inputs, labels = batch
    return PROBLEM.loss(model, (inputs + 0.1 * torch.randn_like(inputs), labels))


def numpy_noise(model: Any, batch: Any) -> Tensor:
    return PROBLEM.loss(model, batch) * (1 + 0.1 * np.random.standard_normal())


def python_noise(model: Any, batch: Any) -> Tensor:
    return PROBLEM.loss(model, batch) * (1 + 0.1 * random.gauss(0, 1))


def logging(model: Any, batch: Any) -> Tensor:
    """Draws that change nothing."""
    random.random()
    np.random.rand()
    return PROBLEM.loss(model, batch)


def recipe(loss: Any, dropout: bool) -> Recipe:
    plain = recipe_of(PROBLEM)
    layers = list(PROBLEM.build())  # type: ignore[call-overload]
    model = nn.Sequential(*layers[:2], nn.Dropout(0.4 if dropout else 0.0), layers[2])
    groups = [([name for name, _ in model.named_parameters()], {"lr": 0.1, "momentum": 0.9})]
    return Recipe(model, loss, PROBLEM.samples, plain.steps, "SGD", groups)


@pytest.mark.parametrize(("loss", "dropout"), [(PROBLEM.loss, True), (noisy, False), (noisy, True), (logging, True)])
def test_scores_are_derivatives_of_the_replay(loss: Any, dropout: bool, tmp_path: Path) -> None:
    made = recipe(loss, dropout)
    run = recorded(made, tmp_path / "run")
    assert hg.verify(run).exact
    assert any(step.random for step in run.steps)

    def measure(state: hg.State) -> Tensor:
        model = recipe(loss, dropout).model.eval()
        model.load_state_dict(state.params)
        inputs, labels = (torch.stack(x) for x in zip(*PROBLEM.queries, strict=True))
        return PROBLEM.loss(model, (inputs, labels)).detach()

    direction = torch.randn(N_TRAIN, dtype=torch.float64)
    scores = values(run, PROBLEM.queries, measurement=PROBLEM.loss)
    assert_close(finite_differences(run, measure, direction, 1e-5), direction @ scores, FINITE_DIFFERENCE)
    forward = hg.hypergradients(run, examples=[2, 7], check=False).scores(PROBLEM.queries, measurement=PROBLEM.loss)
    assert_close(forward.values, scores[[2, 7]], ORACLE)


@pytest.mark.parametrize("loss", [numpy_noise, python_noise])
def test_noise_that_no_derivative_can_repeat_is_refused(loss: Any, tmp_path: Path) -> None:
    run = recorded(recipe(loss, False), tmp_path / "run")
    assert hg.verify(run).exact
    with pytest.raises(hg.UnsupportedError, match=r"random numbers of numpy or Python.*torch"):
        values(run, PROBLEM.queries)
    with pytest.raises(hg.UnsupportedError, match=r"random numbers of numpy or Python.*torch"):
        hg.hypergradients(run, examples=[2])
