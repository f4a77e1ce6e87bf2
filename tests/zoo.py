"""Tiny seeded models with data and losses: one of each kind that a sweep must be able to differentiate.

`CASES` and `BUFFERED` name them; `case(name, dtype)` builds one. Weights and data are drawn in float32 and then cast,
so that the float32 and the float64 version of a case are the same problem.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

N_TRAIN, N_QUERY, CLASSES = 12, 4, 3


@dataclass(frozen=True)
class Case:
    """A model's builder, its per-example loss, training samples and query samples."""

    name: str
    build: Callable[[], nn.Module]
    loss: Callable[[Callable[..., Tensor], Any], Tensor]
    samples: list
    queries: list


def classification(model: Callable[..., Tensor], batch: Any) -> Tensor:
    """Cross-entropy per example, `[b]`."""
    inputs, labels = batch
    return F.cross_entropy(model(inputs), labels, reduction="none")


def token_classification(model: Callable[..., Tensor], batch: Any) -> Tensor:
    """Cross-entropy per token, `[b, L]`."""
    inputs, labels = batch
    losses = F.cross_entropy(model(inputs).flatten(0, 1), labels.flatten(), reduction="none")
    return losses.view(labels.shape)


def regression(model: Callable[..., Tensor], batch: Any) -> Tensor:
    """Squared error per example, summed over the outputs, `[b]`."""
    inputs, targets = batch
    return (model(inputs) - targets).square().sum(1)


class Pooled(nn.Module):
    """A sequence model, averaged over time, then a linear classifier."""

    def __init__(self, core: nn.Module, width: int) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.core(x)
        return self.head((out[0] if isinstance(out, tuple) else out).mean(1))


class SelfAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence with itself."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x)[0]


class DirectAttention(nn.Module):
    """`F.scaled_dot_product_attention` called directly."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(width, 3 * width)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.project(x).unsqueeze(1).chunk(3, dim=-1)
        return x + F.scaled_dot_product_attention(query, key, value).squeeze(1)


class Tied(nn.Module):
    """One matrix used twice: as the embedding and as the classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.middle = nn.Embedding(CLASSES, 5), nn.Linear(5, 5)
        self.output = nn.Linear(5, CLASSES, bias=False)
        self.output.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(torch.tanh(self.middle(self.embedding(tokens).mean(1))))


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    model[0].requires_grad_(False)
    return model


def _weight_norm() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(6, CLASSES))


def _mlp(*middle: nn.Module, out: int = CLASSES) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 6), *middle, nn.Linear(6, out))


def _convnet() -> nn.Module:
    maxed = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2))
    averaged = nn.Sequential(nn.Conv2d(3, 3, 2), nn.GELU(), nn.AvgPool2d(2), nn.Flatten())
    return nn.Sequential(maxed, averaged, nn.Linear(3, CLASSES))


def _groupnorm() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten())
    return nn.Sequential(first, nn.Linear(16, CLASSES))


def _batchnorm() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, CLASSES))


def _embedding() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4), nn.Flatten(), nn.Linear(20, CLASSES))


def _per_token() -> nn.Module:
    return nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


_VECTORS, _IMAGES, _SEQUENCES, _TOKENS, _FEW = "vectors", "images", "sequences", "tokens", "few tokens"
_TABLE: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], str]] = {
    "mlp_tanh": (_mlp(nn.Tanh()), classification, _VECTORS),
    "mlp_relu": (_mlp(nn.ReLU()), classification, _VECTORS),
    "mlp_gelu": (_mlp(nn.GELU()), classification, _VECTORS),
    "layernorm": (_mlp(nn.LayerNorm(6), nn.Tanh()), classification, _VECTORS),
    "regression": (_mlp(nn.Tanh(), out=2), regression, _VECTORS),
    "frozen": (_frozen, classification, _VECTORS),
    "weight_norm": (_weight_norm, classification, _VECTORS),
    "batchnorm": (_batchnorm, classification, _VECTORS),
    "convnet": (_convnet, classification, _IMAGES),
    "groupnorm": (_groupnorm, classification, _IMAGES),
    "embedding": (_embedding, classification, _TOKENS),
    "token_loss": (_per_token, token_classification, _TOKENS),
    "tied": (Tied, classification, _FEW),
    "attention": (lambda: Pooled(SelfAttention(4, 2), 4), classification, _SEQUENCES),
    "sdpa": (lambda: Pooled(DirectAttention(4), 4), classification, _SEQUENCES),
    "rnn": (lambda: Pooled(nn.RNN(4, 4, batch_first=True), 4), classification, _SEQUENCES),
    "lstm": (lambda: Pooled(nn.LSTM(4, 3, batch_first=True), 3), classification, _SEQUENCES),
    "gru": (lambda: Pooled(nn.GRU(4, 3, batch_first=True), 3), classification, _SEQUENCES),
}
CASES = tuple(name for name in _TABLE if name != "batchnorm")
BUFFERED = ("batchnorm",)  # training changes their buffers, which carry derivatives too


def _inputs(kind: str, n: int, generator: torch.Generator) -> Tensor:
    shape = {_VECTORS: (n, 4), _IMAGES: (n, 1, 8, 8), _SEQUENCES: (n, 5, 4), _TOKENS: (n, 5), _FEW: (n, 4)}[kind]
    if kind in (_TOKENS, _FEW):  # few distinct tokens: repeats within a sample and within a batch are certain
        return torch.randint(7 if kind == _TOKENS else CLASSES, shape, generator=generator)
    return torch.randn(shape, generator=generator)


def _draw(kind: str, loss: Callable[..., Tensor], n: int, generator: torch.Generator, dtype: torch.dtype) -> list:
    inputs = _inputs(kind, n, generator)
    inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
    if loss is regression:
        targets = torch.randn(n, 2, generator=generator).to(dtype)
    else:
        shape = inputs.shape if loss is token_classification else (n,)
        targets = torch.randint(CLASSES, shape, generator=generator)
    return list(zip(inputs, targets, strict=True))


def case(name: str, dtype: torch.dtype = torch.float64) -> Case:
    """The case `name` in `dtype`; the same draws on every call."""
    make, loss, kind = _TABLE[name]

    def build() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(7)
            return make().to(dtype)

    generator = torch.Generator().manual_seed(11)
    samples = _draw(kind, loss, N_TRAIN, generator, dtype)
    return Case(name, build, loss, samples, _draw(kind, loss, N_QUERY, generator, dtype))
