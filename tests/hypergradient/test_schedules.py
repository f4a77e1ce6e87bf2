"""What a loop switches on its way, against dense oracles: layers frozen and thawed, momentum, Nesterov's in place."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hydragrad as hg
from tests.hypergradient.recorded import STEPS, recipe_of, recorded, trainable, values
from tests.oracles import Clip, Recipe, recursion, unroll
from tests.step.options import option_id
from tests.tolerances import ORACLE, assert_close
from tests.zoo import N_TRAIN, case

METHODS = ["exact", "gauss-newton", "hessian-free"]
EXAMPLES = [3, 11, 0, 6]
PROBLEM = case("mlp_tanh")
LAYER = ["0.weight", "0.bias"]
WEIGHTS = 1 + 0.3 * torch.linspace(-1, 1, N_TRAIN, dtype=torch.float64).sin()


def check(recipe: Recipe, path: Path, problem: Any = PROBLEM, **given: Any) -> hg.Run:
    """Every method by both sweeps, at the end and after step 5; exact scores by the unrolled run too."""
    run = recorded(recipe, path, **given)
    queries, early = problem.queries, replace(recipe, steps=recipe.steps[:5])
    unrolled, free = unroll(recipe), recursion(early, "hessian-free")
    assert_close(values(run, queries), unrolled.scores(queries), ORACLE)
    assert_close(values(run, queries, step=5), unrolled.scores(queries, t=5), ORACLE)
    assert_close(values(run, queries, "hessian-free", step=5), free.scores(queries), ORACLE)
    for method in METHODS:
        dense = recursion(recipe, method)
        assert_close(values(run, queries, method), dense.scores(queries), ORACLE)
        vectors = hg.hypergradients(run, examples=EXAMPLES, method=method, check=False).vectors
        assert_close(vectors, dense.vectors[EXAMPLES], ORACLE)
    return run


def between(first: int, last: int) -> Callable[[int], Sequence[str]]:
    return lambda t: LAYER if first <= t < last else []


OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"lr": 0.1}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}),
    ("SGD", {"lr": 0.05, "momentum": 0.8, "nesterov": True, "foreach": True}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.1, "eps": 1e-4}),
]


@pytest.mark.parametrize("frozen", [between(2, 5), between(3, 7)], ids=["thawed again", "to the end"])
@pytest.mark.parametrize("option", OPTIONS, ids=option_id)
def test_a_frozen_layer_whose_gradients_stay_zeros(option: Any, frozen: Any, tmp_path: Path) -> None:
    """Momentum and weight decay go on moving it, but no example does."""
    recipe = recipe_of(PROBLEM, *option, frozen=frozen)
    run = check(recipe, tmp_path / "run")
    assert any(step.frozen == {*LAYER} and not step.without_grad for step in run.steps)
    at = replace(recipe, weights=WEIGHTS)
    assert_close(values(run, PROBLEM.queries, weights=WEIGHTS), unroll(at).scores(PROBLEM.queries), ORACLE)


@pytest.mark.parametrize("clip", [0.2, [Clip(0.02, None)]], ids=["norm", "value"])
def test_a_frozen_layer_behind_clipping(clip: Any, tmp_path: Path) -> None:
    check(recipe_of(PROBLEM, clip=clip, frozen=between(2, 5)), tmp_path / "run")


@pytest.mark.parametrize("every", [1, 3])
def test_a_frozen_layer_before_a_batchnorm(every: int, tmp_path: Path) -> None:
    """With stored states at frozen steps, where engines are chosen and gradients compared."""
    problem = case("batchnorm")
    recipe = recipe_of(problem, hyper={"lr": 0.05}, frozen=between(3, 7))
    check(recipe, tmp_path / "run", problem, checkpoint_every=every)


def by_hand(key: str, settings: Sequence[Any], **others: Any) -> list[dict[str, Any]]:
    assert len(settings) == len(STEPS)
    return [{**others, key: setting} for setting in settings]


SCHEDULES = {
    "off and on": ("SGD", by_hand("momentum", [0.9, 0.9, 0.0, 0.0, 0.8, 0.0, 0.9], lr=0.1)),
    "off at the end": ("SGD", by_hand("momentum", [0.9, 0.9, 0.5, 0.8, 0.0, 0.0, 0.0], lr=0.1, weight_decay=0.1)),
    "on late": ("SGD", by_hand("momentum", [0.0, 0.0, 0.9, 0.9, 0.0, 0.9, 0.9], lr=0.1)),
    "rmsprop": ("RMSprop", by_hand("momentum", [0.5, 0.7, 0.0, 0.0, 0.0, 0.5, 0.0], lr=0.01, eps=1e-2)),
    "rmsprop centered": ("RMSprop", by_hand("centered", [True, True, False, True, False, True, False], lr=0.01)),
    "amsgrad": ("Adam", by_hand("amsgrad", [True, True, False, True, True, False, False], lr=0.01, eps=1e-3)),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_switches_of_an_optimizer(name: str, tmp_path: Path) -> None:
    """What a slot holds while it is switched off comes back with it."""
    optimizer, hyper = SCHEDULES[name]
    check(recipe_of(PROBLEM, optimizer, hyper), tmp_path / "run")


def test_groups_that_switch_momentum_in_turns(tmp_path: Path) -> None:
    names = trainable(PROBLEM.build())
    first = by_hand("momentum", [0.9, 0.0, 0.9, 0.0, 0.9, 0.0, 0.9], lr=0.1)
    second = by_hand("momentum", [0.0, 0.9, 0.0, 0.9, 0.0, 0.9, 0.0], lr=0.05)
    check(recipe_of(PROBLEM, groups=[(names[:2], first), (names[2:], second)]), tmp_path / "run")


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_nesterov(foreach: bool, decay: float, tmp_path: Path) -> None:
    """Without weight decay torch's foreach kernel writes the momentum into the gradient itself."""
    hyper = {"lr": 0.05, "momentum": 0.8, "nesterov": True, "foreach": foreach, "weight_decay": decay}
    check(recipe_of(PROBLEM, hyper=hyper), tmp_path / "run")
    check(recipe_of(PROBLEM, hyper=hyper, clip=[Clip(0.02, None)]), tmp_path / "clipped")
