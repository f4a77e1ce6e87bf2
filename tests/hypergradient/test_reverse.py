"""The reverse sweep through `hg.attribute`: its arguments, its invariances, and arithmetic without autograd."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hydragrad as hg
from hydragrad.hypergradient import reverse
from hydragrad.trajectory import moments
from tests.hypergradient.recorded import EPOCHS, STEPS, recipe_of, recorded, values
from tests.oracles import Recipe, closed_form, finite_differences, unroll
from tests.tolerances import FINITE_DIFFERENCE, ORACLE, SAME, assert_close
from tests.zoo import N_QUERY, N_TRAIN, case

METHODS = ["exact", "gauss-newton", "hessian-free"]
PROBLEM = case("mlp_tanh")
QUERIES = PROBLEM.queries


@pytest.fixture(scope="module")
def recipe():
    return recipe_of(PROBLEM)


@pytest.fixture(scope="module")
def run(recipe, tmp_path_factory):
    return recorded(recipe, tmp_path_factory.mktemp("reverse") / "run")


@pytest.fixture(scope="module")
def oracle(recipe):
    return unroll(recipe)


@pytest.fixture(scope="module")
def plain(run):
    return {method: values(run, QUERIES, method) for method in METHODS}


@pytest.mark.parametrize("method", METHODS)
def test_a_replay_runs_the_kernels_of_training_and_a_derivative_those_that_have_one(run, method, monkeypatch):
    fused: dict[str, list[bool]] = {"replay": [], "sweep": []}

    def noting(module, name, kind):
        real = getattr(module, name)

        def noted(*given, **options):
            fused[kind].append(torch.backends.cuda.flash_sdp_enabled())
            return real(*given, **options)

        monkeypatch.setattr(module, name, noted)

    hg.plan(run, len(QUERIES), method)  # what is measured before runs either
    noting(moments, "advance", "replay")
    noting(reverse, "points_of", "sweep")
    values(run, QUERIES, method, memory=1)  # few states: many stretches
    assert len(fused["replay"]) > run.num_steps
    assert len(fused["sweep"]) >= run.num_steps
    assert all(fused["replay"])
    assert not any(fused["sweep"])


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_closed_form(momentum, tmp_path):
    rng = np.random.default_rng(0)
    a, y, w = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 2)), rng.normal(size=3)
    epochs = [[[[0, 1, 2]], [[3, 4, 5]]], [[[0, 0, 4]]]]

    def loss(model: Callable[..., Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        return 0.5 * (model(batch[0]).squeeze(-1) - batch[1]).square().sum(1)

    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data.copy_(torch.from_numpy(w)[None])
    samples = list(zip(torch.from_numpy(a), torch.from_numpy(y), strict=True))
    steps, hyper = [step for epoch in epochs for step in epoch], {"lr": 0.1, "momentum": momentum}
    recipe = Recipe(model, loss, samples, steps, "SGD", [(["weight"], hyper)])
    final, vectors = closed_form(a, y, w, [step[0] for step in steps], 0.1, momentum)
    gradients = np.stack([a[j].T @ (a[j] @ final - y[j]) for j in range(6)])
    run = recorded(recipe, tmp_path / "run", epochs)
    assert_close(values(run, samples), torch.from_numpy(-vectors @ gradients.T), ORACLE)
    assert_close(values(run, samples, "gauss-newton"), torch.from_numpy(-vectors @ gradients.T), ORACLE)


@pytest.mark.parametrize("h", [1e-4, 1e-5])
def test_finite_differences_of_replay(run, plain, h):
    def measure(state: hg.State) -> Tensor:
        model = PROBLEM.build().eval()
        model.load_state_dict({**state.params, **state.buffers})
        inputs, labels = (torch.stack(x) for x in zip(*QUERIES, strict=True))
        return PROBLEM.loss(model, (inputs, labels)).detach()

    direction = torch.randn(N_TRAIN, dtype=torch.float64)
    assert_close(finite_differences(run, measure, direction, h), direction @ plain["exact"], FINITE_DIFFERENCE)


@pytest.mark.parametrize("method", METHODS)
def test_groups_sum_rows(run, plain, method):
    groups = torch.tensor([0, 2, 2, 1, 0, 2, 1, 1, 0, 0, 2, 0])
    found = values(run, QUERIES, method, groups=groups)
    expected = torch.zeros(3, N_QUERY, dtype=torch.float64).index_add_(0, groups, plain[method])
    assert_close(found, expected, SAME)


def test_by_epoch(run, plain, oracle):
    found = values(run, QUERIES, by_epoch=True)
    assert found.shape == (len(EPOCHS), N_TRAIN, N_QUERY)
    by_step = oracle.scores_by_step(QUERIES).split([len(epoch) for epoch in EPOCHS])
    for one, steps in zip(found, by_step, strict=True):
        assert_close(one, steps.sum(0), ORACLE)
    assert_close(found.sum(0), plain["exact"], SAME)


@pytest.mark.parametrize("method", METHODS)
def test_chosen_rows(run, plain, method):
    ids = [7, 0, 3]
    scores = hg.attribute(run, QUERIES, method=method, train=ids, check=False)
    assert torch.as_tensor(scores.train_ids).tolist() == ids
    assert_close(scores.values, plain[method][ids], SAME)


@pytest.mark.parametrize("method", METHODS)
def test_aggregates(run, plain, method):
    for name in ("mean", "sum"):
        found = values(run, QUERIES, method, aggregate=name)
        assert_close(found, getattr(plain[method], name)(1, keepdim=True), SAME)
    found = values(run, QUERIES, method, aggregate=torch.tensor([1, 0, 1, 1]))
    assert_close(found, torch.stack([plain[method][:, 1], plain[method][:, [0, 2, 3]].sum(1)], dim=1), SAME)


@pytest.mark.parametrize("t", [1, 3, 5, len(STEPS)])
def test_any_step_can_be_asked(run, oracle, t):
    assert_close(values(run, QUERIES, step=t), oracle.scores(QUERIES, t=t), ORACLE)


def test_measurement_replaces_the_query_loss(run, oracle):
    def margin(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        logits = model(batch[0])
        return logits.gather(1, batch[1][:, None])[:, 0] - F.softmax(logits, 1).square().sum(1)

    assert_close(values(run, QUERIES, measurement=margin), oracle.scores(QUERIES, margin), ORACLE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [1, 2, 3, 7])
def test_block_size_changes_nothing(run, plain, block, method):
    assert_close(values(run, QUERIES, method, block=block), plain[method], SAME)


@pytest.mark.parametrize("memory", [1, 300_000, 10**9])
def test_memory_budget_changes_nothing(run, plain, memory):
    assert_close(values(run, QUERIES, memory=memory), plain["exact"], SAME)


@pytest.mark.parametrize("method", METHODS)
def test_each_query_stands_alone(run, plain, method):
    for j, query in enumerate(QUERIES):
        assert_close(values(run, [query], method)[:, 0], plain[method][:, j], SAME)
    backwards = values(run, QUERIES[::-1], method)
    assert_close(backwards, plain[method].flip(1), SAME)


def test_linear_in_the_measurement(run, plain):
    def tripled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return 3 * PROBLEM.loss(model, batch) + 5

    assert_close(values(run, QUERIES, measurement=tripled), 3 * plain["exact"], SAME)


def test_same_answer_twice(run, plain):
    # To rounding, not bit for bit: the engine is chosen by measured time, and engines differ in the order of sums.
    assert_close(values(run, QUERIES), plain["exact"], SAME)


# Not Python's own random state: the type checks that run while testing draw from it.
WATCHED = ["tensors", "gradients", "flags", "torch's random state", "numpy's"]


def fingerprint(model: nn.Module) -> list:
    """Everything about a model and the world that a sweep must leave as it found it."""
    tensors = [x.detach().clone() for x in model.state_dict().values()]
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    flags = [(m.training, len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()]
    flags += [(p.requires_grad, id(p), p.data_ptr()) for p in model.parameters()]
    return [tensors, grads, flags, torch.get_rng_state(), np.asarray(list(np.random.get_state())[1]).tolist()]


def same(a, b) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["mlp_tanh", "convnet"])
def test_the_model_is_left_as_it_was(name, training, tmp_path):
    problem = case(name)
    run = recorded(recipe_of(problem), tmp_path / "run")
    model = run.problem.model.train(training)
    for p in list(model.parameters())[1:]:
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)  # not the recorded weights: the user went on with the model
    before = fingerprint(model)
    for method in METHODS:
        values(run, problem.queries, method)
    hg.hypergradients(run, examples=[1, 5], method="exact", check=False).scores(problem.queries)
    after = fingerprint(model)
    assert [name for name, x, y in zip(WATCHED, before, after, strict=True) if not same(x, y)] == []


def test_works_without_a_global_gradient(run, plain):
    with torch.no_grad():
        assert_close(values(run, QUERIES), plain["exact"], SAME)
