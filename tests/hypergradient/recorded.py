"""A recipe trained in a plain loop under `hg.record`, then loaded: the same run that the oracles unroll."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hydragrad as hg
from tests.oracles import Clip, Recipe, clips_of
from tests.zoo import Case

# Two passes over twelve examples (in the second, 3 occurs twice in one batch and 6 never), then one that is cut short.
EPOCHS = [
    [[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]],
    [[[7, 2, 11, 5]], [[3, 8, 3, 0]], [[9, 1, 10, 4]]],
    [[[6, 2]]],
]
STEPS = [step for epoch in EPOCHS for step in epoch]


def trainable(model: nn.Module) -> list[str]:
    """Names of the parameters that train, in the model's order."""
    return [name for name, p in model.named_parameters() if p.requires_grad]


def recipe_of(problem: Case, optimizer: str = "SGD", hyper: Any = None, **more: Any) -> Recipe:
    """The run of `EPOCHS` on a case; SGD with momentum unless told."""
    model = problem.build()
    groups = [(trainable(model), {"lr": 0.1, "momentum": 0.9} if hyper is None else hyper)]
    settings = {"steps": STEPS, "optimizer": optimizer, "groups": groups, **more}
    return Recipe(model, problem.loss, problem.samples, **settings)


class Passes:
    """A batch sampler whose every pass yields the next epoch's batches."""

    def __init__(self, epochs: Sequence[Sequence[Sequence[Sequence[int]]]]) -> None:
        self.epochs = iter([[list(ids) for step in epoch for ids in step] for epoch in epochs])

    def __iter__(self) -> Iterator[list[int]]:
        yield from next(self.epochs)


def optimizer_of(recipe: Recipe, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer with its param groups, as of step 0."""
    named = dict(model.named_parameters())
    groups = [
        {"params": [named[n] for n in names], **(given if isinstance(given, Mapping) else given[0])}
        for names, given in recipe.groups
    ]
    defaults = {k: v for k, v in groups[0].items() if k != "params"}  # Adagrad reads its first accumulator here alone
    return getattr(torch.optim, recipe.optimizer)(groups, **defaults)


def scalar_of(recipe: Recipe, batch: Any, losses: Tensor) -> Tensor:
    """What the loop differentiates."""
    if callable(recipe.reduction):
        coefficients: Any = recipe.reduction(batch, losses.shape)
        return (coefficients * losses).sum()
    return losses.mean() if recipe.reduction == "mean" else losses.sum()


def clip_gradients(recording: hg.Recording, model: nn.Module, clips: float | Sequence[Clip] | None) -> None:
    """As a loop does, through the recording."""
    named = dict(model.named_parameters())
    for clip in clips_of(clips):
        chosen = named.values() if clip.names is None else [named[name] for name in clip.names]
        if clip.p is None:
            recording.clip_grad_value_(chosen, clip.limit)
        else:
            recording.clip_grad_norm_(chosen, clip.limit, clip.p)


def train(recipe: Recipe, path: Path, epochs: Sequence[Any], **more: Any) -> nn.Module:
    """Record the recipe's run, with `more` arguments; the trained model."""
    model = copy.deepcopy(recipe.model)
    optimizer = optimizer_of(recipe, model)
    loader = DataLoader(recipe.samples, batch_sampler=Passes(epochs))  # type: ignore[arg-type]
    names = trainable(model)
    with hg.record(path, model, optimizer, **more) as recording:
        t, waiting = 0, len(recipe.steps[0])
        for _ in epochs:
            for batch in recording.batches(loader):
                recipe.modes(model.train(), t)
                for name in names:
                    model.get_parameter(name).requires_grad_(name not in recipe.still(t))
                scalar = scalar_of(recipe, batch, recipe.loss(model, batch))
                if waiting == len(recipe.steps[t]):  # the step's first micro-batch
                    scalar = scalar + recipe.penalty(dict(model.named_parameters()))
                scalar.backward()
                waiting -= 1
                if waiting:
                    continue
                for group, (_, given) in zip(optimizer.param_groups, recipe.groups, strict=True):
                    group.update(given if isinstance(given, Mapping) else given[t])
                clip_gradients(recording, model, recipe.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=recipe.frozen is None)
                t += 1
                waiting = len(recipe.steps[t]) if t < len(recipe.steps) else 0
    assert t == len(recipe.steps)
    return model


def load(recipe: Recipe, path: Path, **more: Any) -> Any:
    """What was recorded, bound to a fresh model."""
    model = copy.deepcopy(recipe.model)
    return hg.load(path, model=model, loss=recipe.loss, data=recipe.samples, reduction=recipe.reduction, **more)


def recorded(recipe: Recipe, path: Path, epochs: Sequence[Any] = EPOCHS, **given: Any) -> Any:
    """Record, then load."""
    if recipe.steps is STEPS and epochs is not EPOCHS:
        recipe = replace(recipe, steps=[step for epoch in epochs for step in epoch])
    train(recipe, path, epochs, **given)
    return load(recipe, path)


def least_memory(run: Any, queries: int, method: str, **more: Any) -> int:
    """Bytes that the refusal of one byte asks for."""
    with pytest.raises(hg.HydragradError, match="memory is too small for any sweep") as refused:
        hg.plan(run, queries, method, memory=1, **more)
    found = re.search(r"at least (\d+) bytes", str(refused.value))
    assert found is not None
    return int(found[1])


def values(run: Any, queries: Sequence[Any], method: str = "exact", **more: Any) -> Tensor:
    """`hg.attribute(...).values` without the checks, which are tested elsewhere and cost replays.

    ``memory`` 1 stands for the least that will do.
    """
    if more.get("memory") == 1:
        smoothing = 1 if "weights" in more else more.get("smoothing")
        more["memory"] = least_memory(run, len(queries), method, smoothing=smoothing, rows=more.get("rows"))
    return hg.attribute(run, queries, method=method, check=False, **more).values
