"""The models and losses that are compared, by name. Imports torch alone: the other libraries' processes read it too."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))


def logistic() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 2))


def lenet() -> nn.Module:
    """LeNet-5 as commonly trained today: ReLU, max pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10),
    )  # fmt: skip


def first_lenet() -> nn.Module:
    """LeNet-5 as it was published, nearly: tanh, average pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Tanh(), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.Tanh(), nn.Linear(120, 84), nn.Tanh(), nn.Linear(84, 10),
    )  # fmt: skip


def batchnorm_cnn() -> nn.Module:
    """Three convolutions, each with BatchNorm; smooth throughout."""
    widths = (3, 16, 32, 32)
    blocks: list[nn.Module] = []
    for before, after in pairwise(widths):
        convolution = nn.Conv2d(before, after, 3, padding=1, bias=False)
        blocks += [convolution, nn.BatchNorm2d(after), nn.GELU(), nn.AvgPool2d(2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(32 * 4 * 4, 10))


class Transformer(nn.Module):
    """One block of causal attention over characters: [b, L] -> [b, L, characters]."""

    def __init__(self, characters: int = 64, length: int = 32, width: int = 32, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.token, self.place = nn.Embedding(characters, width), nn.Parameter(0.02 * torch.randn(length, width))
        self.before, self.after = nn.LayerNorm(width), nn.LayerNorm(width)
        self.project, self.join = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.last = nn.Linear(width, characters)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.place
        queries, keys, values = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.project(self.before(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        x = x + self.join(mixed.transpose(1, 2).flatten(2))
        return self.last(x + self.narrow(F.gelu(self.wide(self.after(x)))))


def classification(model: Callable[..., Tensor], batch: Any) -> Tensor:
    """Cross entropy per example, [b]."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="none")


def next_character(model: Callable[..., Tensor], batch: Any) -> Tensor:
    """Mean cross entropy of a sequence's characters, [b]."""
    inputs, targets = batch
    losses = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape).mean(1)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "logistic": logistic,
    "lenet": lenet,
    "lenet-tanh": first_lenet,
    "batchnorm-cnn": batchnorm_cnn,
    "transformer": Transformer,
}
LOSSES: dict[str, Callable[..., Tensor]] = {"classification": classification, "next-character": next_character}
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
