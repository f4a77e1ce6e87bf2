"""Torch's slopes of what is measured against finite differences: constants that are none are found and told."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

import hydragrad as hg
from hydragrad.derivatives import DERIVATIVES
from hydragrad.errors import MismatchError
from tests.hypergradient.recorded import recipe_of, recorded
from tests.zoo import case, classification

PROBLEM = case("mlp_tanh")


def partly_detached(model: Any, batch: Any) -> Tensor:
    return classification(model, batch) + 0.15 * model(batch[0]).detach().square().sum(1)


def by_numpy(model: Any, batch: Any) -> Tensor:
    return classification(model, batch) + torch.from_numpy(model(batch[0]).detach().cpu().numpy()).square().sum(1)


def straight_through(model: Any, batch: Any) -> Tensor:
    logits = model(batch[0])
    return classification(model, batch) + (logits + (logits.round() - logits).detach()).sum(1)


def whole(model: Any, batch: Any) -> Tensor:
    return classification(model, batch) + 0.15 * model(batch[0]).square().sum(1)


def with_kinks(model: Any, batch: Any) -> Tensor:
    return classification(model, batch) + F.relu(model(batch[0])).amax(1)


def drawing(model: Any, batch: Any) -> Tensor:
    return classification(model, batch) + torch.rand(len(batch[1])).to(batch[0]) * model(batch[0])[:, 0]


@pytest.fixture(scope="module", params=[torch.float64, torch.float32], ids=str)
def run(request, tmp_path_factory):
    problem = case("mlp_tanh", request.param)
    return recorded(recipe_of(problem), tmp_path_factory.mktemp("slopes") / "run"), problem.queries


@pytest.mark.parametrize("check", [False, True])
@pytest.mark.parametrize("measurement", [partly_detached, by_numpy, straight_through])
def test_a_constant_that_is_none_makes_scores_doubtful(run, measurement, check):
    found = hg.attribute(run[0], run[1], measurement=measurement, check=check, progress=False).diagnostics
    assert found.measurement_error is not None
    assert found.measurement_error > 10 * DERIVATIVES
    assert found.verdict in ("doubtful", "meaningless")
    (told,) = [reason for reason in found.reasons if "slopes of what is measured" in reason]
    assert "detach, no_grad, .item(), numpy" in told


@pytest.mark.parametrize("measurement", [None, whole, with_kinks])
def test_right_slopes_are_not_doubted(run, measurement):
    found = hg.attribute(run[0], run[1], measurement=measurement, progress=False).diagnostics
    assert found.measurement_error is not None
    assert found.measurement_error < 1e-6
    assert found.verdict == "reliable"


def test_a_kink_is_not_a_wrong_slope(tmp_path):
    run = recorded(recipe_of(PROBLEM), tmp_path / "run")
    model, end = PROBLEM.build().eval(), run.replay()
    model.load_state_dict({**end.params, **end.buffers})
    kink = model(torch.stack([sample[0] for sample in PROBLEM.queries]))[:, 0].detach()

    def at_a_kink(model: Any, batch: Any) -> Tensor:
        return classification(model, batch) + F.relu(model(batch[0])[:, 0] - kink[: len(batch[1])])

    found = hg.attribute(run, PROBLEM.queries, measurement=at_a_kink, check=False, progress=False).diagnostics
    assert found.measurement_error is not None
    assert found.measurement_error < 1e-6


def test_a_measurement_that_draws_is_let_be(run):
    found = hg.attribute(run[0], run[1], measurement=drawing, check=False, progress=False).diagnostics
    assert found.measurement_error is None
    assert not any("slopes" in reason for reason in found.reasons)


def without_grad(model: Any, batch: Any) -> Tensor:
    with torch.no_grad():
        return classification(model, batch)


def right(model: Any, batch: Any) -> Tensor:
    return (model(batch[0]).argmax(1) == batch[1]).double()


def rounded(model: Any, batch: Any) -> Tensor:
    return model(batch[0]).round().sum(1)


@pytest.mark.parametrize("measurement", [without_grad, right, rounded])
def test_a_measurement_without_a_slope_is_refused(run, measurement):
    with pytest.raises(MismatchError, match="does not follow the parameters"):
        hg.attribute(run[0], run[1], measurement=measurement, check=False, progress=False)
    with pytest.raises(MismatchError, match="does not follow the parameters"):
        hg.hypergradients(run[0], [0, 3], progress=False).scores(run[1], measurement=measurement)


def test_some_queries_may_be_flat(run):
    def hinge(model: Any, batch: Any) -> Tensor:
        return model(batch[0])[:, 0] * (batch[0].sum(1) == QUERY.to(batch[0]).sum())

    QUERY = run[1][1][0]
    queries = [run[1][0]] * 5 + [run[1][1]] + [run[1][0]] * 5  # the fourth of eleven looked at is another
    scores = hg.attribute(run[0], queries, measurement=hinge, check=False, progress=False)
    assert scores.values[:, 5].any()


def test_scores_of_hypergradients_say_so(run):
    vectors = hg.hypergradients(run[0], [0, 3], progress=False)
    wrong, good = (vectors.scores(run[1], measurement=m).diagnostics for m in (partly_detached, whole))
    assert wrong.verdict == "doubtful"
    assert any("slopes of what is measured" in reason for reason in wrong.reasons)
    assert (good.verdict, good.reasons) == ("unchecked", ())


def test_what_does_not_run_in_float64_is_looked_at_as_it_is(run):
    def with_own(measurement: Any) -> Any:
        def single(model: Any, batch: Any) -> Tensor:
            if batch[0].dtype != run[1][0][0].dtype:
                raise TypeError("of another dtype")
            return measurement(model, batch)

        return single

    for measurement, wrong in ((partly_detached, True), (whole, False)):
        found = hg.attribute(run[0], run[1], measurement=with_own(measurement), check=False, progress=False).diagnostics
        assert found.measurement_error is not None
        assert (found.measurement_error > DERIVATIVES) == wrong


def test_a_loader_is_told_to_be_its_data_set(run):
    with pytest.raises(MismatchError, match=r"give the data set \(loader.dataset\), not the loader"):
        hg.attribute(run[0], DataLoader(run[1]), progress=False)
