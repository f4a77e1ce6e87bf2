"""Single precision: float32 runs, swept either way, against the oracles, which work in float64 throughout."""

import pytest
import torch

import hydragrad as hg
from tests.hypergradient.recorded import recipe_of, recorded, values
from tests.oracles import Recipe, recursion
from tests.tolerances import ORACLE, assert_close
from tests.zoo import N_TRAIN, Case, case

METHODS = ["exact", "gauss-newton", "hessian-free"]
MODELS = ["mlp_tanh", "convnet", "embedding", "layernorm", "attention"]
EXAMPLES = [3, 11, 0, 6]


def assert_both_sweeps(problem: Case, recipe: Recipe, run: hg.Run, method: str) -> None:
    """Scores of both sweeps and the vectors dw/deps, in float32, are those of dense float64 matrices to 1e-4."""
    oracle = recursion(recipe, method)
    assert oracle.vectors.dtype == torch.float64
    expected = oracle.scores(problem.queries)
    scores = values(run, problem.queries, method)
    found = hg.hypergradients(run, examples=EXAMPLES, method=method, progress=False)
    forward = found.scores(problem.queries).values
    assert scores.dtype == found.vectors.dtype == forward.dtype == torch.float32
    assert scores.shape == (N_TRAIN, len(problem.queries))
    assert_close(scores, expected, ORACLE)
    assert_close(forward, expected[EXAMPLES], ORACLE)
    assert_close(found.vectors, oracle.vectors[EXAMPLES], ORACLE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", MODELS)
def test_momentum(name, method, tmp_path):
    problem = case(name, torch.float32)
    recipe = recipe_of(problem)
    assert_both_sweeps(problem, recipe, recorded(recipe, tmp_path / "run"), method)


@pytest.mark.parametrize("method", METHODS)
def test_adamw(method, tmp_path):
    problem = case("mlp_tanh", torch.float32)
    recipe = recipe_of(problem, "AdamW", {"lr": 0.02, "weight_decay": 0.1})
    assert_both_sweeps(problem, recipe, recorded(recipe, tmp_path / "run"), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [1, 3])
def test_blocks_and_budgets(method, block, tmp_path):
    """What is cut differently is added in another order: still within the tolerance of the oracle."""
    problem = case("mlp_tanh", torch.float32)
    recipe = recipe_of(problem)
    run = recorded(recipe, tmp_path / "run")
    expected = recursion(recipe, method).scores(problem.queries)
    for memory in (1, None):
        assert_close(values(run, problem.queries, method, block=block, memory=memory), expected, ORACLE)
