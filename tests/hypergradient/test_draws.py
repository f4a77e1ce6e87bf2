"""Random numbers inside the step: one mask for the training step, every query, every engine and both sweeps."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hydragrad as hg
from hydragrad.hypergradient import exact, gauss_newton, hessian_free
from hydragrad.hypergradient.consistency import gradient_gap
from hydragrad.hypergradient.costs import probe_block
from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tracing import Traced
from hydragrad.step.objective import Objective, Point
from hydragrad.trajectory.moments import forwards
from hydragrad.trajectory.randomness import RandomState
from tests.hypergradient.recorded import recipe_of, recorded, values
from tests.oracles import finite_differences, recursion, unroll
from tests.tolerances import ORACLE, SAME, assert_close, relative_error
from tests.zoo import DRAWING, NativeDropout, case, classification, seeded

METHODS = ["exact", "gauss-newton", "hessian-free"]
FAST = {
    "exact": [exact.ForwardOverReverse, exact.ReverseOverReverse, exact.ReverseOverForward],
    "gauss-newton": [gauss_newton.JvpThenVjp],
    "hessian-free": [hessian_free.Jvp],
}
PLAIN = {"exact": exact.DoubleBackward, "gauss-newton": gauss_newton.DoubleVjp, "hessian-free": hessian_free.DoubleVjp}
EXAMPLES = [3, 11, 0, 6]


@pytest.mark.parametrize("name", DRAWING)
def test_every_model_against_the_unrolled_run(name, tmp_path):
    problem = case(name)
    recipe = recipe_of(problem)
    run = recorded(recipe, tmp_path / "run")
    assert all(step.random for step in run.steps)
    expected = unroll(recipe).scores(problem.queries)
    scores = hg.attribute(run, problem.queries, check=False)
    assert_close(scores.values, expected, ORACLE)
    assert scores.diagnostics.gradient_gap is not None
    assert scores.diagnostics.gradient_gap < 1e-12
    still = unroll(replace(recipe, model=without_noise(problem.build()), loss=plain_loss)).scores(problem.queries)
    assert relative_error(still, expected) > 0.01  # the masks matter


def plain_loss(model: Any, batch: Any) -> Tensor:
    return classification(model, batch)


def without_noise(model: nn.Module) -> nn.Module:
    for part in model.modules():
        for rate in ("p", "dropout"):
            if isinstance(getattr(part, rate, None), float):
                setattr(part, rate, 0.0)
        if isinstance(part, nn.RReLU):
            part.lower = part.upper = 0.25
        if isinstance(part, NativeDropout):
            part.forward = lambda x: x  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["dropout", "dropout2d", "alpha_dropout", "noisy_loss"])
def test_every_method_against_dense_matrices(name, method, tmp_path):
    problem = case(name)
    recipe = recipe_of(problem)
    run = recorded(recipe, tmp_path / "run")
    oracle = recursion(recipe, method)
    expected = oracle.scores(problem.queries)
    for block in (None, 1, 3):
        assert_close(values(run, problem.queries, method, block=block), expected, ORACLE)
    found = hg.hypergradients(run, examples=EXAMPLES, method=method, check=False, progress=False)
    assert_close(found.vectors, oracle.vectors[EXAMPLES], ORACLE)
    assert_close(found.scores(problem.queries).values, expected[EXAMPLES], ORACLE)


@pytest.mark.parametrize("method", METHODS)
def test_single_precision(method, tmp_path):
    problem = case("dropout", torch.float32)
    recipe = recipe_of(problem)
    found = values(recorded(recipe, tmp_path / "run"), problem.queries, method)
    assert found.dtype == torch.float32
    assert_close(found, recursion(recipe, method).scores(problem.queries), ORACLE)


@pytest.mark.parametrize("method", METHODS)
def test_micro_batches_draw_one_after_the_other(method, tmp_path):
    problem, epochs = case("dropout"), [[[[0, 1, 2], [3, 4]], [[5, 6], [7, 5, 8]]], [[[4, 4, 2], [0, 4]]]]
    recipe = recipe_of(problem, "Adam", {"lr": 0.02}, steps=[step for epoch in epochs for step in epoch])
    found = values(recorded(recipe, tmp_path / "run", epochs), problem.queries, method)
    assert_close(found, recursion(recipe, method).scores(problem.queries), ORACLE)


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "lstm_dropout", "rrelu"])
def test_finite_differences_of_replay(name, tmp_path):
    problem = case(name)
    run = recorded(recipe_of(problem), tmp_path / "run")

    def measure(state: hg.State) -> Tensor:
        model = problem.build().eval()
        model.load_state_dict(state.params)
        batch = tuple(torch.stack(x) for x in zip(*problem.queries, strict=True))
        return problem.loss(model, batch).detach()

    direction = torch.randn(run.num_examples, dtype=torch.float64)
    predicted = direction @ values(run, problem.queries)
    assert relative_error(finite_differences(run, measure, direction, 1e-5), predicted) < 1e-7


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", DRAWING)
def test_fast_engines_see_the_same_numbers(name, method, traced, tmp_path):
    """Each engine, for one query and for several, on three batches in turn: as plain autograd has it."""
    sweep = Sweep.of(recorded(recipe_of(case(name)), tmp_path / "run"))
    counts = (1,) if name == "rrelu" else (1, 3)  # torch has no batching rule for it
    for kind in FAST[method]:
        engine = kind(sweep.objective)
        engine = Traced(engine) if traced else engine
        with sweep.objective.differentiable():
            for moment in forwards(sweep.replayer, sweep.run.trajectory, 3):
                point = next(points_of(moment, sweep.objective))[2]
                assert point.draws
                for count in counts:
                    assert_same(engine, PLAIN[method](sweep.objective), point, count)


def assert_same(engine: Engine, plain: Engine, point: Point, count: int) -> None:
    gam = probe_block(point, count)
    (curved, terms, _), (expected, of_terms, _) = engine.products(point, gam), plain.products(point, gam)
    assert_close(terms, of_terms, ORACLE)
    if curved is not None and expected is not None:
        a, b = (torch.cat([x.flatten(1) for x in both], dim=1) for both in (curved, expected))
        assert_close(a, b, ORACLE)


# ---------------------------------------------------------------------------------------------------------------
# Where the numbers come from


@pytest.fixture
def place(tmp_path):
    """A sweep over a run without random numbers, and a moment of it."""
    sweep = Sweep.of(recorded(recipe_of(case("mlp_tanh")), tmp_path / "run"))
    return sweep, next(iter(forwards(sweep.replayer, sweep.run.trajectory, 1)))


def with_dropout(sweep: Sweep, loss: Any = classification) -> Objective:
    """The sweep's objective with dropout in its model, without a seed of its own."""
    first, tanh, last = sweep.objective.module.children()
    model = nn.ModuleDict({"0": first, "1": tanh, "2": last})  # the same names of parameters
    model.forward = lambda x: last(F.dropout(tanh(first(x)), 0.5))  # type: ignore[method-assign]
    return Objective(replace(sweep.run.problem, loss=loss), model, sweep.objective.names)


def test_draws_come_from_the_state_of_the_micro_batch(place):
    sweep, moment = place
    objective = with_dropout(sweep)
    torch.manual_seed(3)
    state = RandomState.capture("cpu", ("torch",))
    torch.rand(1)
    elsewhere = torch.get_rng_state()
    _, batch = moment.batches[0]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        tensors = dict(zip(objective.names, (moment.state.params[n] for n in objective.names), strict=True))
        expected = classification(lambda x: torch.func.functional_call(objective.module, tensors, x), batch)
    moment = replace(moment, random=(state,))
    (_, _, point), *_ = points_of(moment, objective)
    assert [tuple(x.shape) for x in point.draws] == [(4, 6)]
    for _ in range(2):
        assert_close(objective.losses(point.params, point.rest, batch, (), point.draws), expected, SAME)
    assert torch.equal(torch.get_rng_state(), elsewhere)


def test_nothing_is_drawn_where_nothing_was(place):
    sweep, moment = place
    assert moment.random == (None,)
    (_, _, point), *_ = points_of(moment, sweep.objective)
    assert point.draws == ()


def test_a_loss_that_draws_differently_from_call_to_call_is_refused(place):
    sweep, moment = place
    calls = []

    def fickle(model: Any, batch: Any) -> Tensor:
        calls.append(1)
        return classification(model, batch) + (0 if len(calls) % 2 else torch.rand(()))

    objective = with_dropout(sweep, fickle)
    (_, _, point), *_ = points_of(
        replace(moment, random=(RandomState.capture("cpu", ("torch",)),)), with_dropout(sweep)
    )
    objective.losses(point.params, point.rest, point.batch, (), point.draws)
    with pytest.raises(hg.UnsupportedError, match=r"other random numbers.*Expected: 1 draws.*Got: one more"):
        objective.losses(point.params, point.rest, point.batch, (), point.draws)
    with pytest.raises(hg.UnsupportedError, match=r"Expected: 2 draws.*Got: 1"):
        objective.losses(point.params, point.rest, point.batch, (), point.draws * 2)
    with pytest.raises(hg.UnsupportedError, match=r"Expected: \(4, 5\).*Got: \(4, 6\)"):
        objective.losses(point.params, point.rest, point.batch, (), (point.draws[0][:, 1:],))


def test_a_sample_that_moves_with_the_parameters_is_refused(place):
    sweep, moment = place

    def reparametrized(model: Any, batch: Any) -> Tensor:
        return torch.normal(model(batch[0]), 0.1).square().sum(1)

    objective = Objective(
        replace(sweep.run.problem, loss=reparametrized), sweep.objective.module, sweep.objective.names
    )
    with pytest.raises(hg.UnsupportedError, match=r"torch\.normal.*randn_like"):
        list(points_of(replace(moment, random=(RandomState.capture("cpu", ("torch",)),)), objective))


# ---------------------------------------------------------------------------------------------------------------
# The consistency check


def test_the_gradient_gap_is_rounding(place):
    sweep, moment = place
    points = [point for _, _, point in points_of(moment, sweep.objective)]
    assert gradient_gap(sweep.objective, points, moment.gradient) < 1e-14


def test_a_gradient_of_another_computation_is_refused(place):
    sweep, moment = place
    points = [point for _, _, point in points_of(moment, sweep.objective)]
    other = {name: 1.01 * g for name, g in moment.gradient.items()}
    with pytest.raises(hg.MismatchError, match=r"(?s)Expected: norm.*Got: norm.*Likely cause: .*autocast.*Remedy: "):
        gradient_gap(sweep.objective, points, other)
    assert gradient_gap(sweep.objective, points, other, limit=0.02) == pytest.approx(0.01 / 1.01)
    del other["0.weight"]  # frozen at this step: what the step did not use is not compared, the rest is
    with pytest.raises(hg.MismatchError):
        gradient_gap(sweep.objective, points, other)
    assert gradient_gap(sweep.objective, points, other, limit=0.02) == pytest.approx(0.01 / 1.01)


def test_all_micro_batches_make_the_gradient(tmp_path):
    problem, epochs = case("mlp_tanh"), [[[[0, 1, 2], [3, 4]]]]
    run = recorded(recipe_of(problem, steps=epochs[0]), tmp_path / "run", epochs)
    gap = hg.attribute(run, problem.queries, check=False).diagnostics.gradient_gap
    assert gap is not None
    assert gap < 1e-14


def test_numbers_that_cannot_be_handed_out_are_found(tmp_path):
    """A kernel that reads the generator itself, as fused attention does: its mask passes by torch's dispatcher."""

    def fused(model: Any, batch: Any) -> Tensor:
        inputs, labels = batch
        torch.rand(1)
        bits = torch.frombuffer(bytearray(torch.get_rng_state().numpy().tobytes()[-5000:]), dtype=torch.uint8)
        mask = bits[: inputs.numel()].view(inputs.shape) % 2
        return F.cross_entropy(model(inputs * mask), labels, reduction="none")

    problem = case("mlp_tanh")
    run = recorded(replace(recipe_of(problem), loss=seeded(fused)), tmp_path / "run")
    with pytest.raises(hg.MismatchError, match=r"(?s)Likely cause: random numbers.*fused attention.*Remedy: .*MATH"):
        hg.attribute(run, problem.queries, check=False)
