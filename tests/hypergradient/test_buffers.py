"""Buffers that training changes: running statistics and moving averages, in every method, sweep, engine and mode."""

import contextlib
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hydragrad as hg
from hydragrad.derivatives import derivative_error
from hydragrad.hypergradient import exact, gauss_newton, hessian_free
from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.pushing import Push
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tracing import Traced
from hydragrad.step.buffers import PureStatistics
from hydragrad.step.forms import form_of
from hydragrad.step.objective import Objective, Point, Vectors
from hydragrad.trajectory.moments import forwards
from tests.hypergradient.recorded import recipe_of, recorded, values
from tests.oracles import Recipe, finite_differences, recursion, unroll
from tests.tolerances import ORACLE, SAME, assert_close, relative_error
from tests.zoo import BUFFERED, Case, case

METHODS = ["exact", "gauss-newton", "hessian-free"]
ENGINES = [
    *(exact.ForwardOverReverse, exact.ReverseOverReverse, exact.ReverseOverForward, exact.DoubleBackward),
    *(gauss_newton.JvpThenVjp, gauss_newton.DoubleVjp, hessian_free.Jvp, hessian_free.DoubleVjp),
]
EXAMPLES = [3, 11, 0, 6]
TWO_BATCHES = [[[[0, 1, 2], [3, 4]], [[5, 6], [7, 5, 8]], [[9, 1], [10, 11]]], [[[4, 4, 2], [0, 4]]]]


def frozen_from(step: int) -> Callable[[nn.Module, int], None]:
    """Training mode, but for the normalization, which is frozen from a step on."""

    def modes(model: nn.Module, t: int) -> None:
        model.get_submodule("1").train(t < step)

    return modes


def assert_sweeps_match(problem: Case, recipe: Recipe, run: hg.Run, method: str) -> None:
    """Both sweeps against dense matrices: scores, dw/deps and dv/deps."""
    oracle = recursion(recipe, method)
    expected = oracle.scores(problem.queries)
    assert_close(values(run, problem.queries, method), expected, ORACLE)
    found = hg.hypergradients(run, examples=EXAMPLES, method=method, check=False, progress=False)
    assert_close(found.vectors, oracle.vectors[EXAMPLES], ORACLE)
    if found.buffers.shape[1]:
        assert_close(found.buffers, oracle.buffers[EXAMPLES], ORACLE)
    else:
        assert not oracle.buffers.any()
    assert_close(found.scores(problem.queries).values, expected[EXAMPLES], ORACLE)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", BUFFERED)
def test_every_model_against_the_unrolled_run(name, dtype, tmp_path):
    problem = case(name, dtype)
    recipe = recipe_of(problem)
    found = values(recorded(recipe, tmp_path / "run"), problem.queries)
    assert found.dtype == dtype
    assert_close(found, unroll(recipe).scores(problem.queries), ORACLE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", BUFFERED)
def test_every_model_and_method_against_dense_matrices(name, method, tmp_path):
    problem = case(name)
    recipe = recipe_of(problem)
    assert_sweeps_match(problem, recipe, recorded(recipe, tmp_path / "run"), method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("step", [0, 4])
@pytest.mark.parametrize("name", ["batchnorm", "conv_batchnorm", "instancenorm_tracked"])
def test_frozen_statistics(name, step, method, tmp_path):
    """From the start nothing is carried; frozen midway, what came before reaches later gradients through them."""
    problem = case(name)
    recipe = recipe_of(problem, modes=frozen_from(step))
    run = recorded(recipe, tmp_path / "run")
    assert bool(Sweep.of(run).objective.carried) == (step > 0)
    assert_sweeps_match(problem, recipe, run, method)


def test_a_point_has_one_form_wherever_its_state_comes_from(tmp_path):
    """A graph is traced for a form: a stored state, whose file has an order of its own, must not make another."""

    def build() -> nn.Module:
        model = case("batchnorm").build()
        model.get_submodule("1").register_buffer("counted", torch.zeros(2))
        return model

    run = recorded(recipe_of(replace(case("batchnorm"), build=build)), tmp_path / "run")
    sweep = Sweep.of(run)
    (moment,) = forwards(sweep.replayer, run.trajectory, 1)
    buffers, forms = moment.state.buffers, []
    for order in (buffers, dict(reversed(buffers.items()))):
        (_, _, point), *_ = points_of(replace(moment, state=replace(moment.state, buffers=order)), sweep.objective)
        assert sorted(point.rest) == ["1.counted", "1.num_batches_tracked"]
        forms.append(form_of(point.rest, []))
    assert forms[0] == forms[1]


def test_modes_that_alternate(tmp_path, monkeypatch):
    """A traced graph holds for the modes in which it was traced."""
    for share in ("_SHARE", "_FIRST_SHARE"):
        monkeypatch.setattr(f"hydragrad.hypergradient.searching.{share}", 1e9)
    monkeypatch.setattr("hydragrad.hypergradient.searching._TRACING_GAIN", 1e9)
    monkeypatch.setattr("hydragrad.hypergradient.tracing._RARE", 1)
    problem = case("batchnorm")

    def modes(model: nn.Module, t: int) -> None:
        model.get_submodule("1").train(t % 3 != 1)

    recipe = recipe_of(problem, modes=modes)
    run = recorded(recipe, tmp_path / "run")
    scores = hg.attribute(run, problem.queries, compile=False, check=False)
    assert_close(scores.values, unroll(recipe).scores(problem.queries), ORACLE)
    sweep = Sweep.of(run)
    for engine in (Traced(exact.ReverseOverReverse(sweep.objective)), exact.DoubleBackward(sweep.objective)):
        found = sweep_with(engine, sweep, problem)
        assert_close(found, scores.values, SAME)


def sweep_with(engine: Engine, sweep: Sweep, problem: Case) -> Tensor:
    """Scores by a reverse sweep with this very engine."""
    from hydragrad.hypergradient.queries import Columns, Queries
    from hydragrad.hypergradient.reverse import reverse_sweep, start
    from hydragrad.trajectory.moments import Backwards

    names, carried = sweep.objective.names, sweep.objective.carried
    asked = Queries(sweep.run.problem, problem.queries, names, None, sweep.replayer.device, "samples", carried)
    count = len(problem.queries)
    slopes, of_buffers = asked.sensitivities(sweep.end(), Columns.make(None, count), slice(0, count))
    adjoint = start(slopes, sweep.slots, of_buffers)
    scores = torch.zeros(sweep.run.num_examples, count, dtype=torch.float64)

    def sink(ids: Tensor, chosen: slice, terms: Tensor, epoch: int) -> None:
        scores[:, chosen].index_add_(0, ids, terms.T, alpha=-1)

    moments = Backwards(sweep.replayer, sweep.run.trajectory, sweep.stop, 100)
    with sweep.objective.differentiable():
        reverse_sweep(
            moments.stretches(), sweep.objective, sweep.optimizer, engine, adjoint, 3, sink, lambda t, a: None
        )
    return scores


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["batchnorm", "batchnorm_cumulative", "moving_average", "conv_batchnorm_dropout"])
def test_micro_batches_pass_the_buffers_on(name, method, tmp_path):
    problem = case(name)
    recipe = recipe_of(problem, "Adam", {"lr": 0.02, "eps": 1e-4}, steps=[s for e in TWO_BATCHES for s in e])
    assert_sweeps_match(problem, recipe, recorded(recipe, tmp_path / "run", TWO_BATCHES), method)


@pytest.mark.parametrize("block", [1, 3])
@pytest.mark.parametrize("method", METHODS)
def test_blocks_budgets_and_steps(method, block, tmp_path):
    problem = case("batchnorm")
    recipe = recipe_of(problem, modes=frozen_from(5))
    run = recorded(recipe, tmp_path / "run")
    expected = recursion(recipe, method).scores(problem.queries)
    for memory in (1, None):
        assert_close(values(run, problem.queries, method, block=block, memory=memory), expected, ORACLE)
    early = replace(recipe, steps=recipe.steps[:3])
    expected = recursion(early, method).scores(problem.queries)
    assert_close(values(run, problem.queries, method, block=block, step=3), expected, ORACLE)


@pytest.mark.parametrize("name", ["conv_batchnorm_dropout", "moving_average", "batchnorm_cumulative"])
def test_finite_differences_of_replay(name, tmp_path):
    problem = case(name)
    recipe = recipe_of(problem, modes=frozen_from(5) if name == "batchnorm_cumulative" else lambda model, t: None)
    run = recorded(recipe, tmp_path / "run")

    def measure(state: hg.State) -> Tensor:
        model = problem.build().eval()
        model.load_state_dict({**state.params, **state.buffers})
        batch = tuple(torch.stack(x) for x in zip(*problem.queries, strict=True))
        return problem.loss(model, batch).detach()

    direction = torch.randn(run.num_examples, dtype=torch.float64)
    predicted = direction @ values(run, problem.queries)
    assert relative_error(finite_differences(run, measure, direction, 1e-5), predicted) < 1e-7


def error_on_one_batch(run: hg.Run, method: str) -> float:
    sweep = Sweep.of(run)
    moment = list(forwards(sweep.replayer, run.trajectory, 5))[-1]
    error = derivative_error(sweep.objective, next(points_of(moment, sweep.objective))[2], method)
    assert error is not None
    return error


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["conv_batchnorm_dropout", "moving_average", "instancenorm_tracked"])
def test_derivatives_of_buffers_are_checked(name, method, tmp_path, monkeypatch):
    """A kernel with a wrong derivative of V, here one that stops at no_grad, or of g in v, is found."""
    run = recorded(recipe_of(case(name), modes=frozen_from(4 if "norm" in name else 7)), tmp_path / "run")
    assert error_on_one_batch(run, method) < 1e-6
    if name == "moving_average":
        monkeypatch.setattr("hydragrad.step.objective.Attached", contextlib.nullcontext)
        assert error_on_one_batch(run, method) > 0.01
    elif method == "exact":
        monkeypatch.setattr("hydragrad.step.objective.PureStatistics", Still)
        assert error_on_one_batch(run, method) > 0.01


class Still(PureStatistics):  # type: ignore[misc]
    """Frozen statistics that are constants, as torch's kernels take them."""

    def _normalized(self, given: dict[str, Any], instance: bool) -> Tensor:
        if not given.get("training", given.get("use_input_stats")):
            given = {**given, **{name: given[name].detach() for name in ("running_mean", "running_var")}}
        return super()._normalized(given, instance)


# ---------------------------------------------------------------------------------------------------------------
# One point


@pytest.fixture(scope="module", params=["training", "frozen"])
def place(request, tmp_path_factory):
    """A sweep and a point in it: with statistics of the batch, or with those from before."""
    recipe = recipe_of(case("batchnorm"), modes=frozen_from(7 if request.param == "training" else 3))
    sweep = Sweep.of(recorded(recipe, tmp_path_factory.mktemp("buffers") / "run"))
    moment = list(forwards(sweep.replayer, sweep.run.trajectory, 5))[-1]
    point = next(points_of(moment, sweep.objective))[2]
    return sweep, replace(point, weights=torch.rand_like(point.weights) + 0.5)


def dense(objective: Objective, point: Point, method: str) -> tuple[Tensor, Tensor, Tensor]:
    """d(g, V)/d(w, v) as one matrix, the method's second derivatives in its first rows; dg/d eps [P, b]; sizes."""
    inputs = (*point.params, *point.carried)
    sizes, n = [x.numel() for x in inputs], len(point.params)

    def unflat(flat: Tensor) -> Vectors:
        return tuple(x.view(p.shape) for x, p in zip(flat.split(sizes), inputs, strict=True))

    def losses(flat: Tensor) -> Tensor:
        at = unflat(flat)
        return objective.losses(at[:n], point.rest, point.batch, at[n:])

    def after(flat: Tensor) -> Tensor:
        at = unflat(flat)
        moved = objective.evaluate(at[:n], point.rest, point.batch, at[n:])[1]
        return torch.cat([v.flatten() for v in moved])

    def outputs(flat: Tensor) -> Tensor:
        at = unflat(flat)
        (out,), _, _ = objective.outputs(at[:n], point.rest, point.batch, at[n:])
        return out

    u = torch.cat([x.flatten() for x in inputs])
    count = sum(sizes[:n])
    scale = point.coefficients * point.weights
    jac: Any = torch.autograd.functional.jacobian(losses, u)
    moved: Any = torch.autograd.functional.jacobian(after, u)
    second: Any = torch.zeros(len(u), len(u), dtype=u.dtype)
    if method == "exact":
        second = torch.autograd.functional.hessian(lambda x: (scale * losses(x)).sum(), u)
    elif method == "gauss-newton":
        out = outputs(u)
        j: Any = torch.autograd.functional.jacobian(outputs, u)
        h: Any = torch.autograd.functional.hessian(
            lambda y: (scale * nn.functional.cross_entropy(y.view(out.shape), point.batch[1], reduction="none")).sum(),
            out.flatten(),
        )
        second = j.flatten(0, 1).T @ h @ j.flatten(0, 1)
    return torch.cat([second[:count], moved]), (point.coefficients[:, None] * jac).T[:count], torch.tensor(sizes)


def block(like: Vectors, count: int) -> Vectors:
    return tuple(torch.randn(count, *x.shape, dtype=x.dtype) for x in like)


def flat(tensors: Any) -> Tensor:
    return torch.cat([x.flatten(1) for x in tensors], dim=1)


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", ENGINES)
def test_products_are_those_of_dense_matrices(kind, count, traced, place):
    sweep, point = place
    sweep.objective.follow_modes(sweep.run.steps[4].modes)
    engine: Engine = kind(sweep.objective)
    if traced and not kind.batched:
        pytest.skip("plain autograd is not traced")
    matrix, own, sizes = dense(sweep.objective, point, engine.method)
    gam, bet = block(point.params, count), block(point.carried, count)
    pulled = flat((*gam, *bet)) @ matrix
    size = int(sizes[: len(point.params)].sum())
    curved, terms, back = (Traced(engine) if traced else engine).products(point, gam, bet)
    assert curved is not None
    assert_close(flat(curved), pulled[:, :size], ORACLE)
    assert_close(flat(back), pulled[:, size:], ORACLE)
    assert_close(terms, flat(gam) @ own, ORACLE)


@pytest.mark.parametrize("way", ["forwards", "backwards"])
@pytest.mark.parametrize("method", METHODS)
def test_pushed_tangents_are_those_of_dense_matrices(method, way, place):
    sweep, point = place
    sweep.objective.follow_modes(sweep.run.steps[4].modes)
    matrix, _, sizes = dense(sweep.objective, point, method)
    h, y = block(point.params, 3), block(point.carried, 3)
    pushed = flat((*h, *y)) @ matrix.T
    size = int(sizes[: len(point.params)].sum())
    dg, moved = getattr(Push(method, sweep.objective), way)(point, (h, y))
    assert_close(flat(dg), pushed[:, :size], ORACLE) if method != "hessian-free" else None
    assert all(not x.any() for x in dg) or method != "hessian-free"
    assert_close(flat(moved), pushed[:, size:], ORACLE)


@pytest.mark.parametrize("name", ["batchnorm_cumulative", "moving_average", "instancenorm_tracked"])
def test_states_and_the_model_are_not_written_to(name, tmp_path):
    problem = case(name)
    run = recorded(recipe_of(problem), tmp_path / "run")
    sweep = Sweep.of(run)
    moments = list(forwards(sweep.replayer, run.trajectory, 3))
    held = [x for m in moments for x in (*m.state.params.values(), *m.state.buffers.values())]
    held += [x for module in (run.problem.model, sweep.objective.module) for x in module.state_dict().values()]
    before = [x.clone() for x in held]
    with sweep.objective.differentiable():
        for moment in moments:
            point = next(points_of(moment, sweep.objective))[2]
            sweep.objective.after(point)
            for kind in ENGINES:
                kind(sweep.objective).products(point, block(point.params, 1), block(point.carried, 1))
    values(run, problem.queries)
    assert all(torch.equal(x, y) for x, y in zip(held, before, strict=True))


# ---------------------------------------------------------------------------------------------------------------
# Around the sweeps


def test_kept_vectors_come_with_their_buffers(tmp_path):
    problem = case("batchnorm")
    run = recorded(recipe_of(problem), tmp_path / "run")
    made = hg.hypergradients(run, EXAMPLES, path=tmp_path / "kept", progress=False)
    assert made.buffers.shape == (4, 12)
    opened = hg.Hypergradients.load(tmp_path / "kept", run)
    assert torch.equal(opened.vectors, made.vectors)
    assert torch.equal(opened.buffers, made.buffers)
    expected = unroll(recipe_of(problem)).scores(problem.queries)[EXAMPLES]
    assert_close(opened.scores(problem.queries).values, expected, ORACLE)
    (tmp_path / "kept" / "buffers.bin").write_bytes(b"short")
    with pytest.raises(hg.StoreError, match=r"buffers\.bin is damaged.*Expected: 384 bytes.*Got: 5"):
        hg.Hypergradients.load(tmp_path / "kept", run)


def test_the_checks_of_an_attribution_pass(tmp_path):
    problem = case("conv_batchnorm_dropout")
    run = recorded(recipe_of(problem, hyper={"lr": 0.01}), tmp_path / "run")
    for method in METHODS:
        found = hg.attribute(run, problem.queries, method=method).diagnostics
        assert found.derivative_error is not None
        assert found.derivative_error < 1e-6
        assert found.gradient_gap is not None
        assert found.gradient_gap < 1e-12
        assert f"gradient gap {found.gradient_gap:.1e}" in str(found)
        assert found.drift == 0.0
        if method == "exact":
            assert found.ladder[0].error < 0.05


@pytest.mark.parametrize("training", [True, False])
def test_synchronized_normalization_is_refused(training, tmp_path):
    recipe = replace(
        recipe_of(case("batchnorm")), model=nn.SyncBatchNorm.convert_sync_batchnorm(case("batchnorm").build())
    )
    run = recorded(replace(recipe, modes=frozen_from(7 if training else 0)), tmp_path / "run")
    if training:
        with pytest.raises(hg.UnsupportedError, match=r"'1' is a SyncBatchNorm.*Expected: .*one process.*Remedy: "):
            hg.attribute(run, case("batchnorm").queries)
    else:
        frozen = recorded(recipe_of(case("batchnorm"), modes=frozen_from(0)), tmp_path / "frozen")
        queries = case("batchnorm").queries
        assert_close(values(run, queries), values(frozen, queries), SAME)
