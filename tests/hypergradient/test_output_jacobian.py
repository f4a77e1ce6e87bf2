"""The engine with an explicit Jacobian of the convolutions: numbers of plain autograd, refused where it is wrong."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import hydragrad as hg
from hydragrad.hypergradient import gauss_newton
from hydragrad.hypergradient.costs import probe_block, products
from hydragrad.hypergradient.output_jacobian import OutputJacobian, explicit_parameters
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.trajectory.moments import forwards
from tests.hypergradient.recorded import recipe_of, recorded
from tests.tolerances import ORACLE, assert_close
from tests.zoo import case


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Sweep:
    return Sweep.of(recorded(recipe_of(case("convnet")), tmp_path_factory.mktemp("jacobian") / "run"))


def points(sweep: Sweep, count: int) -> list:
    moments = list(forwards(sweep.replayer, sweep.run.trajectory, count))
    return [next(points_of(moment, sweep.objective))[2] for moment in moments]


@pytest.mark.parametrize("count", [1, 3])
def test_products_are_those_of_plain_autograd_at_every_point(sweep, count):
    engine, plain = OutputJacobian(sweep.objective), gauss_newton.DoubleVjp(sweep.objective)
    assert 0 < engine.explicit < len(sweep.objective.names)
    for point in points(sweep, 3):
        point = replace(point, weights=torch.linspace(0.5, 1.5, len(point.weights), dtype=point.weights.dtype))
        gam = probe_block(point, count)
        for _ in range(2):  # the Jacobian formed, and kept for the point
            found, expected = products(engine, point, gam), products(plain, point, gam)
            assert found[0] is not None
            assert expected[0] is not None
            for a, b in zip(found[0], expected[0], strict=True):
                assert_close(a, b, ORACLE)
            assert_close(found[1], expected[1], ORACLE)


def test_what_it_holds_is_the_jacobian(sweep):
    engine = OutputJacobian(sweep.objective)
    (point,) = points(sweep, 1)
    formed = engine._jacobian(0, point.params, point.rest, point.batch, point.coefficients)
    assert engine.held(point) == sum(j.nbytes for j in formed)


def test_explicit_are_the_parameters_up_to_the_last_convolution():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.GroupNorm(1, 2), nn.Conv2d(2, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    names = tuple(name for name, _ in model.named_parameters())
    assert explicit_parameters(model, names) == 6
    assert explicit_parameters(nn.Sequential(nn.Linear(2, 2)), ("0.weight", "0.bias")) == 0
    assert explicit_parameters(nn.Sequential(nn.Conv2d(1, 1, 1)), ("0.weight", "0.bias")) == 0  # nothing beyond


def test_models_without_convolutions_are_refused(tmp_path):
    sweep = Sweep.of(recorded(recipe_of(case("mlp_tanh")), tmp_path / "run"))
    (point,) = points(sweep, 1)
    with pytest.raises(hg.UnsupportedError, match="no convolution"):
        products(OutputJacobian(sweep.objective), point, probe_block(point, 1))


def test_scores_with_it_are_those_without(tmp_path, monkeypatch):
    for share in ("_SHARE", "_FIRST_SHARE"):
        monkeypatch.setattr(f"hydragrad.hypergradient.searching.{share}", 1e9)
    run = recorded(recipe_of(case("convnet")), tmp_path / "run")
    queries = [run.problem.data[i % run.num_examples] for i in range(6)]
    monkeypatch.setattr("hydragrad.hypergradient.searching.candidates", lambda method, objective: ())
    with_it = hg.attribute(run, queries, method="gauss-newton", compile=False, check=False)
    assert "output-jacobian" in with_it.diagnostics.plan
    monkeypatch.undo()
    run.memo.clear()
    without = hg.attribute(run, queries, method="gauss-newton", compile=False, check=False)
    assert "output-jacobian" not in without.diagnostics.plan
    assert_close(with_it.values, without.values, ORACLE)
