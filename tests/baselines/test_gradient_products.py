"""TracIn, gradient products, representer points against loops over single examples."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_collate

import hydragrad as hg
from hydragrad import baselines
from tests.baselines.dense import Dense, trained
from tests.hypergradient.recorded import STEPS
from tests.oracles import unroll
from tests.tolerances import ORACLE, SAME, assert_close
from tests.trajectory.loops import bind, make_data, make_model, record_run
from tests.zoo import case, classification


def dense_at(recipe: Any, problem: Any, step: int) -> Dense:
    """The dense arrays before a step, from a run by plain autograd."""
    unrolled = unroll(recipe, create_graph=False)
    model = copy.deepcopy(recipe.model).eval()
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(unrolled.params[step][name])
    return Dense(model, problem.loss, problem.samples, problem.queries)


@pytest.mark.parametrize("name", ["mlp_tanh", "token_loss"])
def test_tracin_is_the_loop(name, tmp_path):
    names = [n for n, _ in case(name).build().named_parameters()]
    rates = [0.1 / (1 + t) for t in range(len(STEPS))]
    half = len(names) // 2
    # two groups of parameters, each with a learning rate of its own that changes from step to step
    groups = [
        (names[:half], [{"lr": lr, "momentum": 0.9} for lr in rates]),
        (names[half:], [{"lr": 3 * lr, "momentum": 0.9} for lr in rates]),
    ]
    run, _, problem, recipe = trained(name, tmp_path / "run", groups=groups)
    steps, last = [2, 5, len(STEPS)], len(STEPS) - 1
    right, own = torch.zeros(len(problem.samples), len(problem.queries)), torch.zeros(len(problem.samples))
    for step in steps:
        dense = dense_at(recipe, problem, step)
        sizes = dict(dense.model.named_parameters())
        scale = torch.cat(
            [torch.full((sizes[n].numel(),), rates[min(step, last)] * (1 if n in names[:half] else 3)) for n in names]
        )
        right = right + (dense.gradients * scale) @ dense.query_gradients.T
        own = own + dense.gradients.square() @ scale.double()
    assert_close(baselines.tracin(run, problem.queries, checkpoints=steps).values, right, {torch.float64: 1e-6})
    assert_close(baselines.tracin_self(run, checkpoints=steps), own, {torch.float64: 1e-6})


def test_tracin_takes_the_stored_states(tmp_path):
    record_run(tmp_path / "run", checkpoint_every=3)
    run = bind(tmp_path / "run")
    stored = [step for step in run.trajectory.checkpoints if step > 0]
    assert len(stored) > 2
    queries = make_data(4)
    assert torch.equal(baselines.tracin(run, queries).values, baselines.tracin(run, queries, checkpoints=stored).values)
    with pytest.raises(hg.MismatchError, match="no such checkpoints"):
        baselines.tracin(run, queries, checkpoints=[run.num_steps + 1])


@pytest.mark.parametrize("name", ["mlp_relu", "token_loss", "embedding", "attention", "batchnorm"])
def test_dot_and_cosine_are_the_loops(name, tmp_path):
    run, dense, problem, _ = trained(name, tmp_path / "run")
    dots = dense.gradients @ dense.query_gradients.T
    assert_close(baselines.gradient_dot(run, problem.queries).values, dots, ORACLE)
    lengths = dense.gradients.norm(dim=1).unsqueeze(1) * dense.query_gradients.norm(dim=1)
    assert_close(baselines.gradient_cosine(run, problem.queries).values, dots / lengths, ORACLE)


def test_the_memory_given_changes_nothing(tmp_path):
    run, _, problem, _ = trained("mlp_tanh", tmp_path / "run")
    wide = baselines.influence(run, problem.queries, damping=2.0, tolerance=1e-13)
    narrow = baselines.influence(run, problem.queries, damping=2.0, tolerance=1e-13, memory=1, batch=2)
    assert_close(narrow.values, wide.values, SAME)


@pytest.mark.parametrize("name", ["mlp_tanh", "token_loss"])
def test_representer_points_are_features_times_alpha(name, tmp_path):
    run, dense, problem, _ = trained(name, tmp_path / "run")
    last, strength = list(dense.model.children())[-1], 0.02
    assert isinstance(last, nn.Linear)

    def features_and_slopes(sample: Any, mean: bool) -> tuple[Tensor, Tensor]:
        """(phi [L, d + 1], dloss/df [L, C]) of one example."""
        kept = []
        hook = last.register_forward_hook(lambda _, inputs, output: kept.append((inputs[0], output)))
        losses = problem.loss(dense.model, default_collate([sample]))
        hook.remove()
        (slopes,) = torch.autograd.grad(losses.mean() if mean else losses.sum(), kept[0][1])
        phi = kept[0][0].detach().reshape(-1, last.in_features)
        return torch.cat([phi, torch.ones(len(phi), 1)], 1), slopes.reshape(-1, last.out_features)

    of_train = [features_and_slopes(sample, True) for sample in problem.samples]
    of_query = [features_and_slopes(query, False) for query in problem.queries]
    right = torch.empty(len(of_train), len(of_query), dtype=torch.float64)
    for i, (phi, slopes) in enumerate(of_train):
        alpha = -slopes / (2 * strength * len(of_train))
        for j, (phi_query, slopes_query) in enumerate(of_query):
            right[i, j] = -((slopes_query @ alpha.T) * (phi_query @ phi.T)).sum()
    assert_close(baselines.representer(run, problem.queries, strength=strength).values, right, ORACLE)
    with pytest.raises(hg.MismatchError, match="linear layer"):
        baselines.representer(run, problem.queries, layer="0" if name == "token_loss" else "1")


class Doubling(torch.autograd.Function):
    """An operation that vmap does not know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return 2 * gradients[0]


class Unbatched(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(Doubling.apply(x))


def weighted(model: nn.Module, batch: Any) -> Tensor:
    """A batch whose third part has the length of the batch by accident and belongs to no example."""
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * batch[2].square().sum()


def collate_with_twelve(samples: list) -> list:
    return [*default_collate(samples), torch.linspace(0, 1, 12, dtype=torch.float64)]


@pytest.mark.parametrize("kind", ["an operation without vmap", "a tensor that is not per example"])
def test_examples_are_taken_one_by_one_where_vmap_cannot(kind, tmp_path):
    problem = case("mlp_tanh")
    torch.manual_seed(0)
    mixed = kind.startswith("a tensor")
    model = (nn.Linear(4, 3) if mixed else Unbatched()).double()
    loss, collate = (weighted, collate_with_twelve) if mixed else (classification, default_collate)
    loader = DataLoader(problem.samples, batch_size=12, collate_fn=collate)  # type: ignore[arg-type]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with hg.record(tmp_path / "run", model, optimizer, reduction="mean") as recording:
        for batch in recording.batches(loader):
            loss(model, batch).mean().backward()
            optimizer.step()
    run = hg.load(tmp_path / "run", model=model, loss=loss, data=problem.samples, collate_fn=collate)

    def gradients(samples: list) -> Tensor:
        rows = []
        for sample in samples:
            parts = torch.autograd.grad(loss(model, collate([sample]))[0], list(model.parameters()))
            rows.append(torch.cat([part.flatten() for part in parts]))
        return torch.stack(rows)

    right = gradients(problem.samples) @ gradients(problem.queries).T
    assert_close(baselines.gradient_dot(run, problem.queries).values, right, ORACLE)


def test_a_measurement_replaces_the_loss(tmp_path):
    run, dense, problem, _ = trained("regression", tmp_path / "run")

    def first_output(model: nn.Module, batch: Any) -> Tensor:
        return model(batch[0])[:, 0]

    rows = []
    for query in problem.queries:
        w = dense.w.clone().requires_grad_()
        rows.append(torch.autograd.grad(dense.bound(w)(query[0].unsqueeze(0))[0, 0], w)[0])
    found = baselines.gradient_dot(run, problem.queries, measurement=first_output)
    assert_close(found.values, dense.gradients @ torch.stack(rows).T, ORACLE)


def test_the_model_and_the_random_state_stay_as_they_were(tmp_path):
    record_run(tmp_path / "run")
    model = make_model().train()
    run = bind(tmp_path / "run", model=model)
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    for method in (baselines.influence, baselines.tracin, baselines.gradient_cosine, baselines.representer):
        method(run, make_data(3))
    assert model.training
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
