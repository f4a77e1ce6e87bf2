"""Engines: every one of a method computes the same numbers, at every block size, traced or not."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import hydragrad as hg
from hydragrad.hypergradient import exact, gauss_newton, hessian_free
from hydragrad.hypergradient.choosing import choose
from hydragrad.hypergradient.costs import agree, probe_block, products
from hydragrad.hypergradient.curvature import Engine, Products
from hydragrad.hypergradient.engines import candidates
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.reverse import blocks
from hydragrad.hypergradient.scaled import Direct, PerExampleGradients
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tracing import _RARE, Traced, TracedFunction
from hydragrad.step.objective import Objective, Point, Vectors
from hydragrad.trajectory.moments import forwards
from tests.hypergradient.recorded import recipe_of, recorded
from tests.tolerances import ORACLE, SAME, assert_close
from tests.zoo import case

EXACT = [exact.ForwardOverReverse, exact.ReverseOverReverse, exact.ReverseOverForward, exact.DoubleBackward]
GAUSS_NEWTON = [gauss_newton.JvpThenVjp, gauss_newton.DoubleVjp]
HESSIAN_FREE = [hessian_free.Jvp, hessian_free.DoubleVjp]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return Sweep.of(recorded(recipe_of(case("mlp_tanh")), tmp_path_factory.mktemp("engines") / "run"))


@pytest.fixture(scope="module")
def point(sweep):
    moment = list(forwards(sweep.replayer, sweep.run.trajectory, 4))[-1]  # its batch holds an example twice
    point = next(points_of(moment, sweep.objective))[2]
    return Point(point.params, point.rest, point.batch, point.coefficients, torch.rand_like(point.weights) + 0.5)


def dense(objective: Objective, point: Point, method: str, gam: Vectors) -> tuple[Tensor, Tensor]:
    """C gam flattened [K, P] and the terms [K, b], from explicit matrices."""
    sizes = [p.numel() for p in point.params]

    def losses(flat: Tensor) -> Tensor:
        parts = [x.view(p.shape) for x, p in zip(flat.split(sizes), point.params, strict=True)]
        return objective.losses(tuple(parts), point.rest, point.batch)

    def outputs(flat: Tensor) -> Tensor:
        parts = [x.view(p.shape) for x, p in zip(flat.split(sizes), point.params, strict=True)]
        return torch.func.functional_call(
            objective.module, dict(zip(objective.names, parts, strict=True)), point.batch[0]
        )

    w = torch.cat([p.flatten() for p in point.params])
    vectors = torch.cat([g.flatten(1) for g in gam], dim=1)
    scale = point.coefficients * point.weights
    jacobian = torch.autograd.functional.jacobian(losses, w)
    assert isinstance(jacobian, Tensor)
    terms = vectors @ (point.coefficients[:, None] * jacobian).T
    if method == "exact":
        hessian = torch.autograd.functional.hessian(lambda x: (scale * losses(x)).sum(), w)
        assert isinstance(hessian, Tensor)
        return vectors @ hessian, terms
    out = outputs(w)
    j = torch.autograd.functional.jacobian(outputs, w).flatten(0, 1)
    h = torch.autograd.functional.hessian(
        lambda y: (scale * nn.functional.cross_entropy(y.view(out.shape), point.batch[1], reduction="none")).sum(),
        out.flatten(),
    )
    return vectors @ (j.T @ h @ j), terms


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", [*EXACT, *GAUSS_NEWTON])
def test_products_are_those_of_dense_matrices(kind, count, traced, sweep, point):
    if traced and not kind.batched:
        pytest.skip("plain autograd is not traced")
    engine: Engine = kind(sweep.objective)
    gam = probe_block(point, count)
    curved, terms = dense(sweep.objective, point, engine.method, gam)
    c_gam, found, _ = (Traced(engine) if traced else engine).products(point, gam)
    assert c_gam is not None
    assert_close(torch.cat([x.flatten(1) for x in c_gam], dim=1), curved, ORACLE)
    assert_close(found, terms, ORACLE)


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("kind", [*HESSIAN_FREE, PerExampleGradients])
def test_terms_are_those_of_dense_matrices(kind, count, sweep, point):
    engine = kind(sweep.objective)
    gam = probe_block(point, count)
    scale = tuple(torch.rand_like(p) for p in point.params)
    _, terms = dense(sweep.objective, point, "exact", tuple(s * g for s, g in zip(scale, gam, strict=True)))
    scaled = engine if isinstance(engine, PerExampleGradients) else Direct(engine)
    for _ in range(4):  # untraced, traced, and from the gradients kept for the point
        assert_close(scaled.terms(point, scale, gam), terms, ORACLE)


@pytest.mark.parametrize("name", ["convnet", "embedding", "layernorm", "attention", "lstm", "token_loss", "tied"])
@pytest.mark.parametrize("method", ["exact", "gauss-newton", "hessian-free"])
def test_a_traced_graph_serves_other_batches(name, method, tmp_path):
    sweep = Sweep.of(recorded(recipe_of(case(name)), tmp_path / "run"))
    engine = candidates(method, sweep.objective)[0]
    traced = Traced(engine)
    with sweep.objective.differentiable():
        for moment in forwards(sweep.replayer, sweep.run.trajectory, 5):  # one shape, other values at every step
            point = next(points_of(moment, sweep.objective))[2]
            gam = tuple(torch.randn(2, *p.shape, dtype=p.dtype) for p in point.params)
            both = [pytree.tree_leaves(e.products(point, gam)[method == "hessian-free" :]) for e in (traced, engine)]
            for a, b in zip(*both, strict=True):
                assert_close(a, b, SAME)
    assert len(traced.function._graphs) == 1


def test_what_python_reads_out_of_tensors_is_not_traced():
    def depends(x: Tensor) -> Tensor:
        return x * 2 if float(x.sum()) > 0 else x * 3

    with pytest.raises(RuntimeError, match=r"(?i)trac|data-dependent"):
        TracedFunction(depends)(torch.ones(2))


def test_rare_forms_run_untraced():
    calls = []

    def double(x: Tensor) -> Tensor:
        calls.append(x.shape)
        return 2 * x

    function = TracedFunction(double)
    function(torch.ones(4))  # the first form is traced at once: one call
    function(torch.ones(4))
    assert len(calls) == 1
    for turn in range(_RARE + 5):
        assert torch.equal(function(torch.full((3,), float(turn))), torch.full((3,), 2.0 * turn))
    assert len(calls) == 2 + _RARE  # untraced until no longer rare, once to trace, once to compare


@pytest.mark.parametrize("engine", [exact.ForwardOverReverse, gauss_newton.JvpThenVjp, hessian_free.Jvp])
def test_a_rare_form_is_untraced_a_part_of_the_block_at_a_time(sweep, point, engine, monkeypatch):
    """All at once it would take several times the memory of the graph that was planned with."""
    made, real, sizes = engine(sweep.objective), engine.products, list[int]()
    traced = Traced(made)
    traced.prepare(point, probe_block(point, 20))

    def noted(self: Engine, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        sizes.append(len(gam[0]))
        return real(self, point, gam, bet)

    monkeypatch.setattr(engine, "products", noted)
    few = replace(
        point,
        batch=pytree.tree_map(lambda x: x[:2], point.batch),
        coefficients=point.coefficients[:2],
        weights=point.weights[:2],
    )
    gam = probe_block(few, 20)
    found = traced.products(few, gam)
    assert sizes == [3, 3, 3, 3, 3, 3, 2]
    expected = real(made, few, gam)
    assert (found[0] is None) == (expected[0] is None)
    for x, y in zip(pytree.tree_leaves(found), pytree.tree_leaves(expected), strict=True):
        assert_close(x, y, SAME) if y is not None else None


def test_a_later_forms_graph_that_computes_something_else_is_not_used(monkeypatch):
    real = TracedFunction._trace

    def wrong_for_three(self, inputs):
        graph, form = real(self, inputs)
        return (lambda *tensors: [1.01 * x for x in graph(*tensors)]) if len(inputs[0]) == 3 else graph, form

    monkeypatch.setattr(TracedFunction, "_trace", wrong_for_three)
    function = TracedFunction(lambda x: x.square())
    for size in (4, 3, 5):
        for _ in range(_RARE + 3):
            x = torch.randn(size, dtype=torch.float64)
            assert torch.equal(function(x), x.square())
    assert len(function._graphs) == 2


class Wrong(Engine):
    """Exact but for a factor."""

    name, method = "wrong", "exact"

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        curved, terms, back = exact.ForwardOverReverse(self.objective).products(point, gam, bet)
        assert curved is not None
        return tuple(1.01 * c for c in curved), terms, back


def test_an_engine_that_disagrees_is_not_used(sweep, monkeypatch):
    monkeypatch.setattr("hydragrad.hypergradient.searching.candidates", lambda method, objective: (Wrong(objective),))
    for share in ("_SHARE", "_FIRST_SHARE"):
        monkeypatch.setattr(f"hydragrad.hypergradient.searching.{share}", 1e9)
    chosen = choose(sweep, 4, "exact", memory=2**40, block=None, compile=False)
    assert isinstance(chosen.engine, exact.DoubleBackward)
    assert any("disagrees" in reason for reason in chosen.reasons)


def test_agreement_is_about_rounding(sweep, point):
    gam = probe_block(point, 2)
    truth = products(exact.DoubleBackward(sweep.objective), point, gam)
    assert agree(products(exact.ReverseOverReverse(sweep.objective), point, gam), truth)
    assert not agree(products(Wrong(sweep.objective), point, gam), truth)


class Coupled(nn.Module):
    """Subtracts the batch's mean while it trains: an example's loss depends on the rest of its batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y - y.mean(0) if self.training else y


def test_batch_coupled_models_are_exact_and_never_use_per_example_gradients(tmp_path, monkeypatch):
    for share in ("_SHARE", "_FIRST_SHARE"):
        monkeypatch.setattr(f"hydragrad.hypergradient.searching.{share}", 1e9)
    plain = case("mlp_tanh")
    groups = [(["layer.weight", "layer.bias"], {"lr": 0.1})]
    recipe = replace(recipe_of(plain), model=Coupled().double(), groups=groups)
    run = recorded(recipe, tmp_path / "run")
    scores = hg.attribute(run, plain.queries, method="hessian-free", check=False)
    assert "per-example" not in scores.diagnostics.plan.split(";")[0]
    assert "disagrees" in scores.diagnostics.plan


@pytest.mark.parametrize(("queries", "block"), [(1, 1), (7, 3), (6, 3), (5, 8), (360, 64)])
def test_blocks_cover_every_query_once(queries, block):
    seen, widths = [], set()
    for chosen, skip in blocks(queries, block):
        widths.add(chosen.stop - chosen.start)
        seen += range(chosen.start + skip, chosen.stop)
    assert seen == list(range(queries))
    assert len(widths) == 1


def test_a_loss_beside_the_outputs_has_no_gauss_newton_form(sweep, point):
    def regularised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none") + next(model.parameters()).sum()

    problem = type(sweep.objective.problem)(**{**vars(sweep.objective.problem), "loss": regularised})
    objective = Objective(problem, copy.deepcopy(sweep.objective.module), sweep.objective.names)
    with pytest.raises(hg.UnsupportedError, match="Gauss-Newton"):
        objective.check_split(point)
    sweep.objective.check_split(point)
