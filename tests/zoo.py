"""Tiny seeded models with data and losses: one of each kind that a sweep must be able to differentiate.

`CASES` and `BUFFERED` name them; `case(name, dtype)` builds one. Weights and data are drawn in float32 and then cast,
so that the float32 and the float64 version of a case are the same problem.
"""

import copy
import itertools
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


class Centered(nn.Module):
    """Subtracts the moving average of what it saw before, which it keeps outside of autograd (unless told)."""

    average: Tensor

    def __init__(self, width: int, outside: bool = True) -> None:
        super().__init__()
        self.outside = outside
        self.register_buffer("average", torch.linspace(-0.5, 0.5, width))

    def forward(self, x: Tensor) -> Tensor:
        out = x - self.average
        if self.training and self.outside:
            with torch.no_grad():
                self.average.mul_(0.8).add_(x.detach().mean(0), alpha=0.2)
        elif self.training:
            self.average = 0.8 * self.average + 0.2 * x.mean(0)
        return out


class InTraining(nn.Module):
    """A part that is left out in evaluation, as one that couples the examples of a batch must be."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        return self.part(x) if self.training else x


class Stacked(nn.Module):
    """Two layers of LSTM with dropout between them, the last output classified."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.LSTM(4, 3, num_layers=2, dropout=0.4, batch_first=True), nn.Linear(3, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[0][:, -1])


class NativeDropout(nn.Module):
    """The operation that dropout is on CUDA."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.native_dropout(x, 0.4, self.training)[0]


class DroppedAttention(nn.Module):
    """Attention with dropout of its weights: torch's module, or the function called directly."""

    def __init__(self, width: int, direct: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.3, batch_first=True)
        self.direct = direct

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=not self.direct)[0]


_SEEDS = itertools.count(1000)


def seeded(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The loss with a seed of its own, so that it draws the same whenever it sees a batch of that size.

    It leaves another random state each time: that a step drew numbers shows in the state.
    """

    def with_seed(model: Callable[..., Tensor], batch: Any) -> Tensor:
        torch.manual_seed(len(batch[1]))
        losses = loss(model, batch)
        torch.manual_seed(next(_SEEDS))
        return losses

    return with_seed


seeded_classification = seeded(classification)


@seeded
def noisy_classification(model: Callable[..., Tensor], batch: Any) -> Tensor:
    """Noise on the inputs, dropout of the outputs: a loss that draws before the model does, and after it."""
    inputs, labels = batch
    outputs = F.dropout(model(inputs + 0.1 * torch.randn_like(inputs)), 0.3)
    return F.cross_entropy(outputs, labels, reduction="none")


def _frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, CLASSES))
    model[0].requires_grad_(False)
    return model


def _weight_norm() -> nn.Module:
    first = nn.utils.parametrizations.weight_norm(nn.Linear(4, 6))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(6, CLASSES))


def _mlp(*middle: nn.Module, out: int = CLASSES) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(4, 6), *copy.deepcopy(middle), nn.Linear(6, out))


def _convnet() -> nn.Module:
    maxed = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2))
    averaged = nn.Sequential(nn.Conv2d(3, 3, 2), nn.GELU(), nn.AvgPool2d(2), nn.Flatten())
    return nn.Sequential(maxed, averaged, nn.Linear(3, CLASSES))


def _groupnorm() -> nn.Module:
    first = nn.Sequential(nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.Tanh(), nn.AvgPool2d(3), nn.Flatten())
    return nn.Sequential(first, nn.Linear(16, CLASSES))


def _batchnorm(**options: Any) -> Callable[[], nn.Module]:
    return _mlp(nn.BatchNorm1d(6, **options), nn.Tanh())


def _conv(*middle: nn.Module) -> Callable[[], nn.Module]:
    end = nn.Sequential(nn.Tanh(), nn.AvgPool2d(3), nn.Flatten())
    return lambda: nn.Sequential(nn.Conv2d(1, 3, 3), *copy.deepcopy(middle), end, nn.Linear(12, CLASSES))


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
CASES = tuple(_TABLE)

_BUFFERED: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], str]] = {
    "batchnorm": (_batchnorm(), classification, _VECTORS),
    "batchnorm_cumulative": (_batchnorm(momentum=None), classification, _VECTORS),
    "batchnorm_fixed_scale": (_batchnorm(affine=False, momentum=0.3), classification, _VECTORS),
    "batchnorm_untracked": (
        _mlp(InTraining(nn.BatchNorm1d(6, track_running_stats=False)), nn.Tanh()),
        classification,
        _VECTORS,
    ),
    "conv_batchnorm": (_conv(nn.BatchNorm2d(3)), classification, _IMAGES),
    "instancenorm": (_conv(nn.InstanceNorm2d(3, affine=True)), classification, _IMAGES),
    "instancenorm_tracked": (_conv(nn.InstanceNorm2d(3, track_running_stats=True)), classification, _IMAGES),
    "moving_average": (_mlp(Centered(6), nn.Tanh()), classification, _VECTORS),
    "conv_batchnorm_dropout": (_conv(nn.BatchNorm2d(3), nn.Dropout(0.3)), seeded_classification, _IMAGES),
}
BUFFERED = tuple(_BUFFERED)  # normalization: training changes their buffers, which carry derivatives too

_DRAWING: dict[str, tuple[Callable[[], nn.Module], Callable[..., Tensor], str]] = {
    "dropout": (_mlp(nn.Dropout(0.4), nn.Tanh()), seeded_classification, _VECTORS),
    "native_dropout": (_mlp(NativeDropout(), nn.Tanh()), seeded_classification, _VECTORS),
    "dropout2d": (_conv(nn.Dropout2d(0.4)), seeded_classification, _IMAGES),
    "alpha_dropout": (_mlp(nn.SELU(), nn.AlphaDropout(0.3)), seeded_classification, _VECTORS),
    "feature_alpha_dropout": (_conv(nn.FeatureAlphaDropout(0.3)), seeded_classification, _IMAGES),
    "rrelu": (_mlp(nn.RReLU()), seeded_classification, _VECTORS),
    "attention_dropout": (lambda: Pooled(DroppedAttention(4, False), 4), seeded_classification, _SEQUENCES),
    "sdpa_dropout": (lambda: Pooled(DroppedAttention(4, True), 4), seeded_classification, _SEQUENCES),
    "lstm_dropout": (Stacked, seeded_classification, _SEQUENCES),
    "noisy_loss": (_mlp(nn.Dropout(0.2), nn.Tanh()), noisy_classification, _VECTORS),
}
DRAWING = tuple(_DRAWING)  # random numbers are drawn inside the step
_TABLE |= _BUFFERED | _DRAWING


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
