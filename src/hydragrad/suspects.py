"""The answer of a search for wrong labels: every training example, the most suspicious first."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, final

import torch
from torch import Tensor

from hydragrad.errors import UnsupportedError, message
from hydragrad.report.measures import average_ranks
from hydragrad.shapes import Float, Int

if TYPE_CHECKING:
    import pandas


_SPANS = {
    "el2n": (0.0, 2**0.5),
    "margin": (-1.0, 1.0),
    "doubt": (0.0, 1.0),
    "late": (0.0, 1.0),
    "combined": (0.0, 1.0),
    "ensemble": (0.0, 1.0 + 2**0.5),
}
"""The least and the largest value of signals that have both."""


class Suspect(NamedTuple):
    """One row: an example, its label, the label that fits better (may be its own), its score (higher: worse).

    ``confidence``: in the suggested label, in [0, 1]. None where labels are unknown.
    """

    id: int
    label: int | None
    suggested: int | None
    score: float
    confidence: float | None


@final
@dataclass(frozen=True)
class Suspects:
    """Training examples ranked by how suspicious their labels are. All tensors are in the order of the data.

    ``score`` [N], higher: worse, is ``signals[signal]``; ``signals``: all that were computed, by name;
    ``label``, ``suggested`` int64 [N] and ``confidence``, ``quality`` [N] in [0, 1]: in the suggested and in the given
    label (None where the examples have no labels that could be compared); ``note``: why, or how losses
    were read.

    Example: ``print(hydragrad.mislabels(run))``.
    """

    signal: str
    score: Float[Tensor, " N"]
    label: Int[Tensor, " N"] | None = None
    suggested: Int[Tensor, " N"] | None = None
    confidence: Float[Tensor, " N"] | None = None
    quality: Float[Tensor, " N"] | None = None
    signals: Mapping[str, Tensor] = field(default_factory=dict)
    note: str = ""

    def __len__(self) -> int:
        return len(self.score)

    @cached_property
    def ids(self) -> Int[Tensor, " N"]:
        """Positions in the training data, the most suspicious first."""
        return self.score.sort(descending=True, stable=True).indices

    @property
    def flagged(self) -> Tensor:
        """Examples for which another label fits better along the run, bool [N]; none without labels."""
        if self.label is None or self.suggested is None:
            return torch.zeros(len(self), dtype=torch.bool)
        return self.label != self.suggested

    def top(self, k: int = 10) -> list[Suspect]:
        """The k most suspicious examples."""
        return [self._row(i) for i in self.ids[: max(k, 0)].tolist()]

    def to_pandas(self) -> "pandas.DataFrame":
        """A table by example id, the most suspicious first: label, suggested, score, confidence, and every signal."""
        pandas = _pandas("to_pandas")
        columns: dict[str, Any] = {"score": self.score.numpy()}
        for name in ("label", "suggested", "confidence"):
            if (values := getattr(self, name)) is not None:
                columns[name] = values.numpy()
        columns |= {f"signal_{name}": values.numpy() for name, values in self.signals.items()}
        return pandas.DataFrame(columns).rename_axis("id").iloc[self.ids.tolist()]

    def to_cleanlab(self) -> "pandas.DataFrame":
        """Cleanlab's table of label issues, a row an example in the order of the data.

        ``is_label_issue``: another label fits better; ``label_quality`` in [0, 1], lower: worse: in the order of the
        chosen ``signal`` (1 at its least possible value, 0 at its largest; for signals without such, by rank);
        ``given_label``, ``predicted_label``. Raises UnsupportedError without labels.
        """
        if self.label is None or self.suggested is None:
            raise UnsupportedError(
                message(
                    "there are no label issues without labels",
                    expected="classification samples, or relabel= and classes=",
                    got=self.note,
                    remedy="use to_pandas()",
                )
            )
        return _pandas("to_cleanlab").DataFrame(
            {
                "is_label_issue": self.flagged.numpy(),
                "label_quality": self._label_quality().numpy(),
                "given_label": self.label.numpy(),
                "predicted_label": self.suggested.numpy(),
            }
        )

    def __str__(self) -> str:
        lines = [f"{len(self)} training examples, the most suspicious first, by {self.signal}"]
        if self.suggested is not None:
            lines.append(f"  for {int(self.flagged.sum())} of them another label fits better, averaged along the run")
        if self.note:
            lines.append(f"  {self.note}")
        for row in self.top(10):
            words = f"  example {row.id}: score {row.score:.3f}"
            if row.label is not None and row.confidence is not None:
                words += f", label {row.label}, "
                words += "fits best" if row.suggested == row.label else f"rather {row.suggested}"
                words += f" (confidence {row.confidence:.2f})"
            lines.append(words)
        return "\n".join([*lines, f"  ... and {len(self) - 10} more"] if len(self) > 10 else lines)

    def _label_quality(self) -> Tensor:
        if self.signal in _SPANS:
            least, most = _SPANS[self.signal]
            return (1 - (self.score - least) / (most - least)).clamp(0, 1)
        return 1 - (average_ranks(self.score) - 0.5) / len(self)

    def _row(self, i: int) -> Suspect:
        label, suggested = (None if x is None else int(x[i]) for x in (self.label, self.suggested))
        return Suspect(
            i, label, suggested, float(self.score[i]), None if self.confidence is None else float(self.confidence[i])
        )


def _pandas(method: str) -> Any:
    try:
        import pandas
    except ImportError as error:
        raise ImportError(f"{method}() needs pandas: pip install 'hydragrad[pandas]'") from error
    return pandas
