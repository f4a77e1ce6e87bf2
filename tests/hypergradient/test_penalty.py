"""A penalty on the parameters: in the replayed gradient, in the curvature, and never scaled by example weights."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hydragrad as hg
from hydragrad.hypergradient.engines import candidates
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tracing import Traced
from hydragrad.trajectory.moments import forwards
from tests.hypergradient.recorded import EPOCHS as WHOLE
from tests.hypergradient.recorded import load, recipe_of, train, values
from tests.oracles import Recipe, finite_differences, recursion, unroll
from tests.tolerances import FINITE_DIFFERENCE, ORACLE, SAME, assert_close
from tests.zoo import N_TRAIN, case

PROBLEM = case("mlp_tanh")
METHODS = ["exact", "gauss-newton", "hessian-free"]


def quartic(params: Mapping[str, Tensor]) -> Tensor:
    """Its Hessian depends on the parameters and couples the two layers."""
    first, second = (params[name].square().sum() for name in ("0.weight", "2.weight"))
    return 0.05 * first * second + 0.02 * params["2.bias"].pow(4).sum()


def linear(params: Mapping[str, Tensor]) -> Tensor:
    """No curvature at all."""
    return 0.05 * params["0.weight"].sum()


PENALTIES = {"quartic": quartic, "linear": linear}
EPOCHS = [[[[0, 1, 2], [3, 4]], [[5, 6], [7, 5, 8]], [[9], [10, 11]]], [[[4, 4], [0, 4]]]]


def penalised(kind: str, tmp_path: Path, optimizer: str = "SGD", hyper: Any = None) -> tuple[Recipe, hg.Run]:
    penalty = PENALTIES[kind]
    recipe = recipe_of(PROBLEM, optimizer, hyper, steps=[s for e in EPOCHS for s in e], penalty=penalty)
    train(recipe, tmp_path / "run", EPOCHS)
    return recipe, load(recipe, tmp_path / "run", penalty=lambda model: penalty(dict(model.named_parameters())))


@pytest.mark.parametrize("option", [("SGD", None), ("AdamW", {"lr": 0.02, "weight_decay": 0.1})], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_sweeps_agree_with_the_oracle(kind: str, option: tuple[str, Any], tmp_path: Path) -> None:
    recipe, run = penalised(kind, tmp_path, *option)
    assert hg.verify(run).exact
    for method in METHODS:
        expected = recursion(recipe, method)
        assert_close(values(run, PROBLEM.queries, method), expected.scores(PROBLEM.queries), ORACLE)
        found = hg.hypergradients(run, examples=[4, 0], method=method, check=False)
        assert_close(found.vectors, expected.vectors[[4, 0]], ORACLE)
    assert_close(values(run, PROBLEM.queries), unroll(recipe).scores(PROBLEM.queries), ORACLE)


@pytest.mark.parametrize("method", METHODS[:2])
@pytest.mark.parametrize("block", [1, 4])
def test_every_engine_counts_it(method: str, block: int, tmp_path: Path) -> None:
    """Many queries, so that the faster engines are tried as well."""
    recipe, run = penalised("quartic", tmp_path)
    queries = PROBLEM.queries * 30
    found = values(run, queries, method, block=block)
    assert_close(found, recursion(recipe, method).scores(queries), ORACLE)


@pytest.mark.parametrize("method", METHODS[:2])
def test_traced_graphs_know_the_first_micro_batch(method: str, tmp_path: Path) -> None:
    _, run = penalised("quartic", tmp_path)
    sweep = Sweep.of(run)
    moment = next(forwards(sweep.replayer, run.trajectory, 1))
    engine = candidates(method, sweep.objective)[0]
    traced = Traced(engine)
    points = [point for _, _, point in points_of(moment, sweep.objective)]
    points.append(replace(points[0], first=False))
    assert [point.first for point in points] == [True, False, False]
    gam = tuple(torch.ones(2, *p.shape, dtype=p.dtype) for p in points[0].params)
    found = []
    for point in points:
        curved, plain = traced.products(point, gam)[0], engine.products(point, gam)[0]
        assert curved is not None
        assert plain is not None
        found.append(torch.cat([c.flatten() for c in curved]))
        assert_close(found[-1], torch.cat([c.flatten() for c in plain]), SAME)
    assert (found[0] - found[2]).abs().max() > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_beside_carried_buffers_both_sweeps_agree(method: str, tmp_path: Path) -> None:
    problem = case("batchnorm")
    recipe = recipe_of(problem, penalty=lambda params: 0.05 * params["0.weight"].pow(4).sum())
    train(recipe, tmp_path / "run", WHOLE)
    run = load(recipe, tmp_path / "run", penalty=lambda model: recipe.penalty(dict(model.named_parameters())))
    found = values(run, problem.queries, method)
    vectors = hg.hypergradients(run, examples=range(N_TRAIN), method=method, check=False)
    assert_close(vectors.scores(problem.queries).values, found, ORACLE)
    if method == "exact":
        assert_close(found, unroll(recipe).scores(problem.queries), ORACLE)


def test_weights_do_not_scale_it(tmp_path: Path) -> None:
    recipe, run = penalised("quartic", tmp_path)

    def measure(state: hg.State) -> Tensor:
        model = PROBLEM.build().eval()
        model.load_state_dict(state.params)
        inputs, labels = (torch.stack(x) for x in zip(*PROBLEM.queries, strict=True))
        return PROBLEM.loss(model, (inputs, labels)).detach()

    direction = torch.randn(N_TRAIN, dtype=torch.float64)
    scores = values(run, PROBLEM.queries)
    assert_close(finite_differences(run, measure, direction, 1e-5), direction @ scores, FINITE_DIFFERENCE)

    params = {name: p.detach().clone() for name, p in recipe.model.named_parameters()}
    for _ in recipe.steps:  # with every example removed, plain descent on the penalty alone
        leaves = {name: p.requires_grad_() for name, p in params.items()}
        grads = torch.autograd.grad(quartic(leaves), list(leaves.values()), materialize_grads=True)
        params = {n: (p - 0.1 * g).detach() for (n, p), g in zip(leaves.items(), grads, strict=True)}
    plain = recipe_of(PROBLEM, "SGD", {"lr": 0.1}, steps=recipe.steps, penalty=quartic)
    train(plain, tmp_path / "plain", EPOCHS)
    run = load(plain, tmp_path / "plain", penalty=lambda model: quartic(dict(model.named_parameters())))
    for name, p in run.replay(weights=torch.zeros(N_TRAIN)).params.items():
        torch.testing.assert_close(p, params[name], rtol=1e-12, atol=1e-14)


def test_a_missing_or_misshapen_penalty_is_refused(tmp_path: Path) -> None:
    recipe, _ = penalised("quartic", tmp_path)
    with pytest.raises(hg.MismatchError, match=r"step 0 differs"):
        load(recipe, tmp_path / "run")

    def rows(model: nn.Module) -> Tensor:
        return next(model.parameters()).square().sum(1)

    with pytest.raises(hg.MismatchError, match=r"penalty is not a number.*shape \[\].*shape \[6\]"):
        load(recipe, tmp_path / "run", penalty=rows)
