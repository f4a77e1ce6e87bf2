"""The forward sweep through `hg.hypergradients`: against the oracle's dw/deps, and against the reverse sweep."""

import pytest
import torch

import hydragrad as hg
from tests.hypergradient.recorded import recipe_of, recorded, values
from tests.oracles import recursion, unroll
from tests.step.options import CHOSEN, option_id
from tests.tolerances import ORACLE, SAME, assert_close
from tests.zoo import CASES, case

EXAMPLES = [3, 11, 0, 6]
METHODS = ["exact", "gauss-newton", "hessian-free"]


@pytest.mark.parametrize("option", CHOSEN, ids=option_id)
def test_every_optimizer_and_method(option, tmp_path):
    problem = case("mlp_tanh")
    recipe = recipe_of(problem, *option)
    run = recorded(recipe, tmp_path / "run")
    for method in METHODS:
        found = hg.hypergradients(run, examples=EXAMPLES, method=method, check=False)
        assert_close(found.vectors, recursion(recipe, method).vectors[EXAMPLES], ORACLE)
        assert_close(found.scores(problem.queries).values, values(run, problem.queries, method)[EXAMPLES], ORACLE)


@pytest.mark.parametrize("name", CASES)
def test_every_model_against_the_oracle_and_the_reverse_sweep(name, tmp_path):
    problem = case(name)
    recipe = recipe_of(problem)
    run = recorded(recipe, tmp_path / "run")
    found = hg.hypergradients(run, examples=EXAMPLES, method="exact", check=False)
    assert_close(found.vectors, unroll(recipe).vectors(EXAMPLES), ORACLE)
    assert_close(found.scores(problem.queries).values, values(run, problem.queries)[EXAMPLES], ORACLE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("clip", [None, 0.2])
def test_accumulation_and_clipping(method, clip, tmp_path):
    problem, epochs = case("mlp_tanh"), [[[[0, 1, 2], [3, 4]], [[5, 6], [7, 5, 8]]], [[[4, 6], [0, 3, 3]]]]
    steps = [step for epoch in epochs for step in epoch]
    recipe = recipe_of(problem, "Adam", {"lr": 0.02}, steps=steps, clip=clip)
    run = recorded(recipe, tmp_path / "run", epochs)
    found = hg.hypergradients(run, examples=EXAMPLES, method=method, check=False)
    assert_close(found.vectors, recursion(recipe, method).vectors[EXAMPLES], ORACLE)


@pytest.mark.parametrize("method", METHODS)
def test_each_example_stands_alone(method, tmp_path):
    run = recorded(recipe_of(case("mlp_tanh")), tmp_path / "run")
    together = hg.hypergradients(run, examples=EXAMPLES, method=method, check=False).vectors
    for i, vector in zip(EXAMPLES, together, strict=True):
        alone = hg.hypergradients(run, examples=[i], method=method, check=False).vectors
        assert_close(alone[0], vector, SAME)


def test_axes_of_the_answer(tmp_path):
    problem = case("mlp_tanh")
    run = recorded(recipe_of(problem), tmp_path / "run")
    scores = hg.hypergradients(run, examples=EXAMPLES, method="exact", check=False).scores(problem.queries[:2])
    assert isinstance(scores, hg.Attribution)
    assert torch.as_tensor(scores.train_ids).tolist() == EXAMPLES
    assert torch.as_tensor(scores.query_ids).tolist() == [0, 1]
    assert scores.values.shape == (4, 2)
