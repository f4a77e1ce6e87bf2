"""The oracles' own tests: against torch.optim, against each other, and against arithmetic without autograd."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import default_collate

from tests.oracles import Recipe, clips_of, closed_form, recursion, unroll
from tests.step.options import CHOSEN, OPTIONS, option_id
from tests.step.rules import RULES, full_hyper, initial_state
from tests.tolerances import ORACLE, SAME, UPDATE, assert_close
from tests.zoo import BUFFERED, CASES, Case, case

STEPS = [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]], [[3, 8, 3, 0]], [[5, 1], [2, 2, 9]]]


def recipe_of(problem: Case, optimizer: str, hyper: dict, **more) -> Recipe:
    model = problem.build()
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    settings = {"steps": STEPS, "optimizer": optimizer, "groups": [(names, hyper)], **more}
    return Recipe(model, problem.loss, problem.samples, **settings)


def trained_by_torch(recipe: Recipe, weights: Tensor) -> nn.Module:
    """The same run in a loop as people write it; example i's loss counts `weights[i]` times."""
    model = recipe.model
    hyper: Any = recipe.groups[0][1]
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = getattr(torch.optim, recipe.optimizer)(trained, **hyper)
    for step in recipe.steps:
        optimizer.zero_grad()
        for ids in step:
            losses = recipe.loss(model, default_collate([recipe.samples[i] for i in ids]))
            weighted = losses * weights[list(ids)].view(-1, *[1] * (losses.ndim - 1))
            (weighted.mean() if recipe.reduction == "mean" else weighted.sum()).backward()
        for clip in clips_of(recipe.clip):
            nn.utils.clip_grad_norm_(model.parameters(), clip.limit)
        optimizer.step()
    return model


def flat(model: nn.Module) -> Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("option", OPTIONS, ids=option_id)
def test_rules_equal_torch_optim(option):
    name, given = option
    generator = torch.Generator().manual_seed(1)
    param = nn.Parameter(torch.randn(3, 4, generator=generator, dtype=torch.float64))
    optimizer = getattr(torch.optim, name)([param], **given)
    w, hyper = param.detach().clone(), full_hyper(name, given)
    slots, scalars = initial_state(name, w, hyper)
    for _ in range(5):
        param.grad = torch.randn(3, 4, generator=generator, dtype=torch.float64)
        w, slots, scalars = RULES[name](w, param.grad, slots, hyper, scalars)
        optimizer.step()
        assert_close(w, param, UPDATE)
        for slot, value in slots.items():
            assert_close(value, optimizer.state[param][slot], UPDATE)


@pytest.mark.parametrize("name", CASES + BUFFERED)
def test_unrolled_run_equals_torch(name):
    problem = case(name)
    recipe = recipe_of(problem, "SGD", {"lr": 0.1, "momentum": 0.9})
    unrolled = unroll(recipe, create_graph=False)
    with sdpa_kernel(SDPBackend.MATH):
        model = trained_by_torch(recipe, torch.ones(12, dtype=torch.float64))
    assert_close(unrolled.flat(), flat(model), UPDATE)
    for key, buffer in model.named_buffers():
        if buffer.is_floating_point():
            assert_close(unrolled.buffers[-1][key], buffer, UPDATE)


@pytest.mark.parametrize(("reduction", "clip"), [("sum", None), ("mean", 0.05), ("sum", 0.5)])
def test_reduction_and_clipping_equal_torch(reduction, clip):
    recipe = recipe_of(case("mlp_tanh"), "Adam", {"lr": 0.02}, reduction=reduction, clip=clip)
    unrolled = unroll(recipe, create_graph=False)
    assert_close(unrolled.flat(), flat(trained_by_torch(recipe, torch.ones(12, dtype=torch.float64))), UPDATE)


@pytest.mark.parametrize("name", ["mlp_tanh", "batchnorm", "token_loss"])
def test_unrolled_scores_equal_differences_of_retraining(name):
    problem, h, i = case(name), 1e-5, 3
    recipe = recipe_of(problem, "SGD", {"lr": 0.1, "momentum": 0.9})
    queries = default_collate(problem.queries)
    measured = []
    for sign in (1, -1):
        weights = torch.ones(12, dtype=torch.float64)
        weights[i] += sign * h
        model = trained_by_torch(recipe_of(problem, "SGD", {"lr": 0.1, "momentum": 0.9}), weights).eval()
        measured.append(problem.loss(model, queries).reshape(4, -1).sum(1).detach())
    expected = -(measured[0] - measured[1]) / (2 * h)
    assert_close(unroll(recipe).scores(problem.queries)[i], expected, {torch.float64: 1e-7})


@pytest.mark.parametrize("option", CHOSEN, ids=option_id)
def test_recursion_equals_unrolling(option):
    problem = case("mlp_tanh")
    recipe = recipe_of(problem, *option)
    unrolled, stepped = unroll(recipe), recursion(recipe, "exact")
    assert_close(stepped.final, unrolled.flat(), UPDATE)
    assert_close(stepped.vectors, unrolled.vectors(range(12)), ORACLE)
    assert_close(stepped.scores(problem.queries), unrolled.scores(problem.queries), ORACLE)


def test_gauss_newton_is_exact_for_a_linear_model_and_not_for_others():
    linear = case("mlp_tanh")
    groups = [(["weight", "bias"], {"lr": 0.1})]
    recipe = Recipe(nn.Linear(4, 3).double(), linear.loss, linear.samples, STEPS, "SGD", groups)
    assert_close(recursion(recipe, "gauss-newton").vectors, recursion(recipe, "exact").vectors, SAME)
    curved = recipe_of(linear, "SGD", {"lr": 0.1})
    exact, other, free = (recursion(curved, m).vectors for m in ("exact", "gauss-newton", "hessian-free"))
    assert (other - exact).abs().max() > 1e-3 * exact.abs().max()
    assert (free - exact).abs().max() > (other - exact).abs().max()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_closed_form_equals_unrolling(momentum):
    rng = np.random.default_rng(0)
    a, y, w = rng.normal(size=(6, 2, 3)), rng.normal(size=(6, 2)), rng.normal(size=3)
    batches = [[0, 1, 2], [3, 4, 5], [0, 0, 4]]
    final, vectors = closed_form(a, y, w, batches, 0.1, momentum)

    model = nn.Linear(3, 1, bias=False).double()
    model.weight.data.copy_(torch.from_numpy(w)[None])
    samples = list(zip(torch.from_numpy(a), torch.from_numpy(y), strict=True))
    recipe = Recipe(
        model,
        lambda model, batch: 0.5 * (model(batch[0]).squeeze(-1) - batch[1]).square().sum(1),
        samples,
        [[ids] for ids in batches],
        "SGD",
        [(["weight"], {"lr": 0.1, "momentum": momentum})],
    )
    unrolled = unroll(recipe)
    assert_close(unrolled.flat(), torch.from_numpy(final), UPDATE)
    assert_close(unrolled.vectors(range(6)), torch.from_numpy(vectors), ORACLE)
