"""How examples are named and shown on a page."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from hydragrad.attribution import Ranked
from hydragrad.labels import label_of
from hydragrad.report.content import Example
from hydragrad.report.samples import Look, Show, look_of, number, signed


@final
@dataclass(frozen=True)
class Display:
    """``data``: the training data; ``groups``: of its examples, where the rows of the scores are such.

    ``side``: pixels of an image; ``show``, ``names``, ``true_labels``: as given to ``write_report``.
    """

    data: Any
    groups: Tensor | None
    show: Show | None
    names: Sequence[str] | None
    true_labels: Tensor | None
    side: int

    def named(self, label: int | None) -> str:
        """A label in words."""
        if label is None:
            return ""
        known = self.names is not None and 0 <= label < len(self.names)
        return str(self.names[label]) if known and self.names is not None else str(label)

    def look(self, data: Any, place: int) -> Look:
        """How ``data[place]`` looks."""
        return look_of(data, place, self.show, self.side)

    def example(self, row: Ranked, what: str) -> Example:
        """A row of a ranking; ``what`` would change without it."""
        words = f"removing it would {'raise' if row.score >= 0 else 'lower'} {what} by about {number(abs(row.score))}"
        if self.groups is not None:
            members = int((self.groups == row.id).sum())
            return Example(row.id, row.score, signed(row.score), words, f"group {row.id}: {members} examples")
        label = label_of(self.data, row.id)
        true, look = self.wrong(row.id, label), self.look(self.data, row.id)
        return Example(row.id, row.score, signed(row.score), words, f"example {row.id}", self.named(label), true, look)

    def wrong(self, place: int, label: int | None) -> str:
        """The true label of a training example, in words, where it is known and is not the given one."""
        if self.true_labels is None or label is None or int(self.true_labels[place]) == label:
            return ""
        return self.named(int(self.true_labels[place]))
