"""The three tables: models by optimizers, models by features of the loop, optimizers by features."""

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.cells import Cell, Option, outcome
from tests.support.features import FEATURES

MODELS = {
    "MLP": "mlp_tanh",
    "convolutions, pooling": "convnet",
    "BatchNorm": "conv_batchnorm",
    "BatchNorm, cumulative (`momentum=None`)": "batchnorm_cumulative",
    "InstanceNorm with running statistics": "instancenorm_tracked",
    "LayerNorm": "layernorm",
    "GroupNorm": "groupnorm",
    "a moving average of one's own": "moving_average",
    "embedding": "embedding",
    "token losses `[b, L]`": "token_loss",
    "`MultiheadAttention`": "attention",
    "`scaled_dot_product_attention`": "sdpa",
    "RNN": "rnn",
    "LSTM": "lstm",
    "weight_norm": "weight_norm",
    "tied weights": "tied",
}
# eps: the bias before a normalization has no gradient but rounding, which the default of 1e-8 would amplify
OPTIMIZERS: dict[str, Option] = {
    "SGD": ("SGD", {"lr": 0.1}),
    "SGD, momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.05}),
    "Adam": ("Adam", {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.05}),
    "AdamW": ("AdamW", {"lr": 0.02, "eps": 1e-4, "weight_decay": 0.05}),
    "RMSprop": ("RMSprop", {"lr": 0.01, "eps": 1e-4, "momentum": 0.5}),
    "Adagrad": ("Adagrad", {"lr": 0.05, "eps": 1e-4}),
    "NAdam": ("NAdam", {"lr": 0.02, "eps": 1e-4}),
    "others (Adadelta)": ("Adadelta", {"lr": 1.0}),
}
BY_NAME = {feature.name: feature for feature in FEATURES}
PLAIN = BY_NAME["plain"]
OF_THE_LOOP = {"data kept (`keep_batches`)", "several loaders", "sum of the losses", "weighted losses", "schedule"}
"""Features that do not meet the model's layers: shown with the optimizers only."""
OF_THE_LAYERS = {feature.name for feature in FEATURES if feature.applies is not PLAIN.applies}
SYMBOLS = {"exact": "exact", "approximate": "near", "refused": "refused", "none": "-"}


@dataclass(frozen=True)
class Table:
    """Rows by columns, each cell a combination of a model, an optimizer, a feature."""

    title: str
    first: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]

    def cell(self, row: str, column: str) -> Cell:
        model, optimizer, feature = "MLP", "SGD, momentum", PLAIN.name
        for name in (row, column):
            model = name if name in MODELS else model
            optimizer = name if name in OPTIMIZERS else optimizer
            feature = name if name in BY_NAME else feature
        with tempfile.TemporaryDirectory() as folder:
            return outcome(MODELS[model], OPTIMIZERS[optimizer], BY_NAME[feature], Path(folder) / "run")

    def line(self, row: str) -> tuple[str, list[tuple[str, Cell]]]:
        """The row as the page has it, and what was found, by column."""
        cells = [(column, self.cell(row, column)) for column in self.columns]
        return f"| {row} | " + " | ".join(SYMBOLS[cell.kind] for _, cell in cells) + " |", cells

    def head(self) -> list[str]:
        return [
            f"## {self.title}",
            "",
            f"| {self.first} | " + " | ".join(self.columns) + " |",
            "|---" * (len(self.columns) + 1) + "|",
        ]


def _features(left_out: set[str]) -> tuple[str, ...]:
    return tuple(feature.name for feature in FEATURES if feature is not PLAIN and feature.name not in left_out)


TABLES = (
    Table("Models and optimizers", "model", tuple(MODELS), tuple(OPTIMIZERS)),
    Table("Features of the loop and optimizers", "feature", _features(OF_THE_LAYERS), tuple(OPTIMIZERS)[:-1]),
    Table("Models and features of the loop", "model", tuple(MODELS), _features(OF_THE_LOOP)),
)


def reasons(found: Iterable[tuple[str, Cell]]) -> list[str]:
    """Why combinations were refused, or are near only: each reason once, with the first place it was met at."""
    seen: dict[tuple[str, str], str] = {}
    for place, cell in found:
        if cell.reason:
            seen.setdefault((SYMBOLS[cell.kind], cell.reason), place)
    return [f"| {kind} | {place} | {reason} |" for (kind, reason), place in sorted(seen.items())]
