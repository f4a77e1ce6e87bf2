"""Features of training loops: what each does to the run, and how the loop does it."""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

import hydragrad as hg
from hydragrad.trajectory.augmentation import EpochIndex
from tests.oracles import Clip, Recipe
from tests.zoo import seeded

EPOCHS = [[[[0, 1, 2]], [[3, 4, 5]]], [[[5, 2, 5]], [[1, 0, 3]]], [[[4, 2]]]]
"""Examples in another order, one twice in a batch, some never again, the last pass cut short."""
ACCUMULATED = [[[[0, 1, 2], [3, 4]], [[5, 3, 1]]], [[[5, 2], [2, 0, 4]]]]
NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)


def steps_of(epochs: Sequence[Any]) -> list[Any]:
    return [step for epoch in epochs for step in epoch]


def same(given: Any) -> Any:
    return given


@dataclass(frozen=True)
class Feature:
    """``change``: the run that the oracle unrolls; the rest: how the loop differs from the plain one.

    ``wrap``: what the loop calls in place of the model; ``data``: what the loader yields, of the samples, and ``seen``:
    what the oracle trains on instead, every epoch's versions one after the other; ``before(model, t)``; ``skipped``:
    steps before which a batch is looked at and dropped; ``half``: why scores may be off, and how far; ``applies``: to
    which models.
    """

    name: str
    change: Callable[[Recipe], Recipe] = same
    epochs: Sequence[Any] = field(default_factory=lambda: EPOCHS)
    wrap: Callable[[nn.Module], nn.Module] = same
    data: Callable[[Sequence[Any]], Any] = same
    seen: Callable[[Any, int], list[Any]] | None = None
    before: Callable[[nn.Module, int], None] | None = None
    skipped: frozenset[int] = frozenset()
    scale: float | None = None
    autocast: torch.dtype | None = None
    dtype: torch.dtype = torch.float64
    keep_batches: bool = False
    loaders: int = 1
    within: float | None = None
    applies: Callable[[nn.Module], bool] = lambda model: True


def named(recipe: Recipe) -> list[str]:
    return [name for names, _ in recipe.groups for name in names]


def hyper_of(recipe: Recipe) -> dict[str, Any]:
    given = recipe.groups[0][1]
    assert isinstance(given, dict)
    return given


def _schedule(recipe: Recipe) -> Recipe:
    given = [{**hyper_of(recipe), "lr": hyper_of(recipe)["lr"] * 0.7**t} for t in range(len(recipe.steps))]
    return replace(recipe, groups=[(named(recipe), given)])


def _groups(recipe: Recipe) -> Recipe:
    names, given = named(recipe), hyper_of(recipe)
    second = {**given, "lr": 0.3 * given["lr"], "weight_decay": 0.05}
    return replace(recipe, groups=[(names[:1], given), (names[1:], second)])


def _frozen(recipe: Recipe) -> Recipe:
    """The first parameter rests from step 3 on: for those that never train again a learning rate of 0 is the same."""
    names, given = named(recipe), hyper_of(recipe)
    resting = [{**given, "lr": given["lr"] * (t < 3)} for t in range(len(recipe.steps))]
    return replace(recipe, groups=[(names[:1], resting), (names[1:], given)])


def _freeze(model: nn.Module, t: int) -> None:
    next(model.parameters()).requires_grad_(t < 3)


def _penalty(params: Any) -> Tensor:
    return 0.05 * torch.stack([p.pow(2).sum() + p.pow(4).sum() for p in params.values()]).sum()


def coefficients(batch: Any, shape: torch.Size) -> Tensor:
    """Weights of one's own, by class."""
    weights = torch.tensor([0.2, 0.4, 0.6], dtype=torch.float64)[batch[1]]
    return weights.reshape(*weights.shape, *[1] * (len(shape) - weights.dim())).expand(shape) / 3


def _dropped(recipe: Recipe) -> Recipe:
    def loss(model: Callable[..., Tensor], batch: Any) -> Tensor:
        return recipe.loss(lambda *args: F.dropout(model(*args), 0.3), batch)

    return replace(recipe, loss=seeded(loss))


def _numpy_noise(recipe: Recipe) -> Recipe:
    def loss(model: Callable[..., Tensor], batch: Any) -> Tensor:
        return recipe.loss(model, batch) * (1 + 0.1 * float(np.random.rand()))

    return replace(recipe, loss=loss)


class Shaken(Dataset):
    """Each time another version: noise on what is continuous, a rotation of what is not."""

    def __init__(self, samples: Sequence[Any]) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Any:
        x, label = self.samples[index]
        if x.is_floating_point():
            return x + 0.1 * torch.randn_like(x), label
        turn = random.randrange(1, len(x))
        return x.roll(turn), label if label.shape != x.shape else label.roll(turn)


def _versions(data: Any, epochs: int) -> list[Any]:
    return [data[EpochIndex(i, e)] for e in range(epochs) for i in range(len(data))]


def _eval_norms(recipe: Recipe, start: int) -> Recipe:
    def modes(model: nn.Module, t: int) -> None:
        for part in model.modules():
            if isinstance(part, NORMS) or type(part).__name__ == "PlainNorm":
                part.train(t < start)

    return replace(recipe, modes=modes)


def normalized(model: nn.Module) -> bool:
    return any(isinstance(part, nn.modules.batchnorm._NormBase) for part in model.modules())


def convolutional(model: nn.Module) -> bool:
    return any(isinstance(part, nn.Conv2d) for part in model.modules())


def _compiled(model: nn.Module) -> nn.Module:
    torch._dynamo.reset()  # every cell is a model of its own: nothing to remember
    return torch.compile(model, backend="eager")  # type: ignore[return-value]


FEATURES = [
    Feature("plain"),
    Feature("dropout, noise in the loss", _dropped),
    Feature("augmentation (`Augmented`)", data=lambda s: hg.Augmented(Shaken(s)), seen=_versions),
    Feature("data kept (`keep_batches`)", keep_batches=True),
    Feature("accumulation", epochs=ACCUMULATED),
    Feature("several loaders", loaders=2),
    Feature("sum of the losses", lambda r: replace(r, reduction="sum")),
    Feature("weighted losses", lambda r: replace(r, reduction=coefficients)),
    Feature("clipping by norm", lambda r: replace(r, clip=0.3)),
    Feature("clipping by value", lambda r: replace(r, clip=[Clip(0.05, None)])),
    Feature("penalty", lambda r: replace(r, penalty=_penalty)),
    Feature("schedule", _schedule),
    Feature("parameter groups", _groups),
    Feature("a layer frozen midway", _frozen, before=_freeze),
    Feature("normalization frozen", lambda r: _eval_norms(r, 0), applies=normalized),
    Feature("normalization frozen midway", lambda r: _eval_norms(r, 2), applies=normalized),
    Feature("skipped batches", skipped=frozenset({1, 3})),
    Feature("`GradScaler`", scale=2.0**10),
    Feature("compiled", wrap=_compiled),
    Feature("channels last", wrap=lambda m: m.to(memory_format=torch.channels_last), applies=convolutional),  # type: ignore[call-overload]
    Feature("float32", dtype=torch.float32),
    Feature("autocast (bfloat16)", dtype=torch.float32, autocast=torch.bfloat16, within=0.25),
    Feature("bfloat16 parameters", dtype=torch.bfloat16),
    Feature("noise of numpy in the loss", _numpy_noise),
]
