"""What a page is about: a run, its scores, the queries, and what the trained model says of them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from hydragrad.attribution import Attribution
from hydragrad.hypergradient.queries import Columns
from hydragrad.labels import label_of, labels_of
from hydragrad.retraining.measuring import queries_of
from hydragrad.run import Run
from hydragrad.signals.probabilities import Scale
from hydragrad.signals.trying import LabelLosses
from hydragrad.trajectory.state import State

CLASSES = 100
"""With more distinct labels than these none are tried on a query."""
_EXAMPLES = 4
"""Training examples a class, at least, in which weights of the classes are looked for."""


class Said(NamedTuple):
    """A query's own label and the one that the model finds likeliest, with the probabilities of both."""

    label: int
    own: float
    predicted: int
    confidence: float


@final
@dataclass(frozen=True)
class Subject:
    """A run and its scores for ``queries``; ``columns`` and ``groups`` say how queries and examples were combined."""

    run: Run
    scores: Attribution
    queries: Any
    columns: Columns
    groups: Tensor | None
    measurement: Callable[[nn.Module, Any], Tensor] | None
    step: int | None

    @cached_property
    def state(self) -> State:
        """The model that was asked."""
        stop = self.run.num_steps if self.step is None else self.step
        stored = stop in self.run.trajectory.checkpoints
        return self.run.trajectory.state(stop) if stored else self.run.replay(until=stop)

    @cached_property
    def values(self) -> Tensor:
        """The measurement of every column, float64 [M]."""
        each = queries_of(self.run, self.queries, self.measurement).values(self.state).double().cpu()
        total = torch.zeros(self.columns.count, dtype=torch.float64)
        return total.index_add_(0, self.columns.of, each * self.columns.factor.double())

    @property
    def what(self) -> str:
        """What was measured, in words."""
        return "the loss" if self.measurement is None else "the measurement"

    @property
    def single(self) -> bool:
        """Whether every column is one query."""
        return torch.equal(self.columns.of, torch.arange(len(self.columns.of)))

    @cached_property
    def labels(self) -> Tensor | None:
        """The labels of all training examples, int64 [N]; None where there are none."""
        return labels_of(self.run.problem.data)

    @cached_property
    def query_labels(self) -> Tensor | None:
        """The labels of the queries, int64 [M]; None where there are none, or queries were combined."""
        return labels_of(self.queries) if self.single else None

    def said(self, ids: Sequence[int]) -> dict[int, Said]:
        """What the model says of these queries: its probabilities, as the losses with every label show them.

        For other losses than cross entropy: their softmax. Empty for queries without labels, or with too many of them.
        """
        if self.labels is None or not self.single or not len(ids):
            return {}
        own = [label for place in ids if (label := label_of(self.queries, place)) is not None]
        if len(own) < len(ids):
            return {}
        classes = sorted({*self.labels.unique().tolist(), *own})
        if not 2 <= len(classes) <= CLASSES:
            return {}
        chosen = [self.queries[place] for place in ids]
        losses = LabelLosses(self.run, classes, data=chosen)(self.state)[1]
        scale = self._scale(classes)
        p = torch.softmax(-(scale.unweighted(losses) if scale.holds(losses) else losses).double(), 1)
        best = p.argmax(1).tolist()
        return {
            place: Said(label, float(p[row, classes.index(label)]), classes[best[row]], float(p[row, best[row]]))
            for row, (place, label) in enumerate(zip(ids, own, strict=True))
        }

    def _scale(self, classes: Sequence[int]) -> Scale:
        """How losses show probabilities, seen on training examples from all over the data."""
        data = self.run.problem.data
        most = max(1, len(data) // (_EXAMPLES * len(classes)))
        seen = [data[place] for place in range(0, len(data), most)]
        return Scale.of(LabelLosses(self.run, classes, data=seen)(self.state)[1])
