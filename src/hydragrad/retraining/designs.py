"""Which changes are made to put scores to the proof, and what the scores predict of each."""

import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.labels import Relabel, label_of
from hydragrad.retraining.counterfactual import Change

METRICS = ("loo", "subset", "remove", "relabel")
COUNTS = {"loo": 30, "subset": 50, "remove": 3, "relabel": 20}
"""Default n: examples removed, subsets, random draws per size, suspects."""
SIZES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Default fractions of the rows that ``remove`` removes."""


@final
@dataclass(frozen=True)
class Item:
    """One retraining: ``kind`` "one", "subset", "helpful", "harmful", "random" or "relabelled"; ``ids``: the examples.

    ``size``: rows of the scores (examples or groups); ``target``: the query that the ranking was for (None: the mean,
    or no ranking); ``label``: the new label.
    """

    kind: str
    ids: tuple[int, ...]
    size: int
    target: int | None = None
    label: int | None = None


@final
@dataclass(frozen=True)
class Design:
    """Items with their changes and predictions [n, M]."""

    items: list[Item]
    changes: list[Change]
    predicted: Tensor


@final
class Rows:
    """The rows of the scores [R, M] and the training examples behind each: ids, or groups of them."""

    def __init__(self, scores: Tensor, row_ids: Tensor, groups: Tensor | None) -> None:
        self.scores, self.ids, self._groups = scores, row_ids, groups
        self.count = len(row_ids)

    @property
    def grouped(self) -> bool:
        """Whether the rows are groups of examples."""
        return self._groups is not None

    def members(self, rows: Tensor) -> tuple[int, ...]:
        """The examples behind these rows, in order."""
        chosen = self.ids[rows]
        if self._groups is not None:
            chosen = torch.isin(self._groups, chosen).nonzero().flatten()
        return tuple(sorted(chosen.tolist()))

    def mean(self) -> Tensor:
        """Each row's score for the mean query."""
        return self.scores.mean(1)


def one_by_one(rows: Rows, n: int, choice: str, generator: torch.Generator) -> Design:
    """``n`` rows removed one at a time: at random, or half of them among the largest |score| on average."""
    if choice not in ("uniform", "stratified"):
        raise UnsupportedError(message("unknown choice", expected="'uniform' or 'stratified'", got=repr(choice)))
    order = torch.randperm(rows.count, generator=generator)
    if choice == "stratified":
        extreme = rows.scores.abs().mean(1).sort(descending=True, stable=True).indices[: n // 2]
        order = torch.cat([extreme, order[~torch.isin(order, extreme)]])
    return _removals(rows, [("one", None, order[i : i + 1]) for i in range(min(n, rows.count))])


def subsets(rows: Rows, n: int, fraction: float, generator: torch.Generator) -> Design:
    """``n`` random subsets of a fraction of the rows, each removed at once."""
    size = _size(fraction, rows.count)
    if size == rows.count or (isinstance(fraction, float) and fraction >= 1):
        raise MismatchError(
            message(
                "no such part of the rows",
                expected=f"a fraction in (0, 1) or 1 to {rows.count - 1} rows, so that some are left to train on",
                got=repr(fraction),
            )
        )
    drawn = [torch.randperm(rows.count, generator=generator)[:size] for _ in range(n)]
    return _removals(rows, [("subset", None, chosen) for chosen in drawn])


def extremes(
    rows: Rows,
    n: int,
    sizes: Sequence[float],
    targets: Sequence[tuple[int | None, Tensor]],
    weight: float,
    generator: torch.Generator,
) -> Design:
    """For every size the most helpful and the most harmful rows of each target, and ``n`` random draws.

    ``targets``: (query id or None for the mean, scores [R]).
    """
    counts = sorted({_size(size, rows.count) for size in sizes})
    chosen: list[tuple[str, int | None, Tensor]] = []
    for target, column in targets:
        order = column.sort(descending=True, stable=True).indices
        for size in counts:
            chosen += [("helpful", target, order[:size]), ("harmful", target, order.flip(0)[:size])]
    for _ in range(n):
        order = torch.randperm(rows.count, generator=generator)
        chosen += [("random", None, order[:size]) for size in counts]
    return _removals(rows, chosen, weight)


def _integer(given: Any) -> int | None:
    """An integer of Python, numpy or torch as Python's; None for anything else."""
    if isinstance(given, Tensor) and (given.dim() > 0 or given.is_floating_point()):
        return None
    try:
        return int(operator.index(given))
    except TypeError:
        return None


def relabelled(rows: Rows, data: Any, changes: Mapping[Any, Any], relabel: Relabel) -> Design:
    """One example at a time gets another label (or is replaced by another sample); predicted: its removal."""
    items, made, predicted = [], [], []
    for key, given in changes.items():
        place = _integer(key)
        at = [] if place is None else (rows.ids == place).nonzero().flatten()
        if place is None or len(at) != 1:
            raise MismatchError(
                message(
                    "an example to relabel has no row in the scores",
                    expected=f"train ids of the scores, such as {rows.ids[:5].tolist()}",
                    got=key,
                )
            )
        label = _integer(given)
        sample = given if label is None else relabel(data[place], label)
        items.append(Item("relabelled", (place,), 1, label=label_of([sample], 0)))
        made.append(Change((place,), samples=(sample,)))
        predicted.append(rows.scores[at[0]])
    if not items:
        raise MismatchError(message("nothing to relabel", expected="labels={id: label or sample}", got="an empty dict"))
    return Design(items, made, torch.stack(predicted))


def _removals(rows: Rows, chosen: Sequence[tuple[str, int | None, Tensor]], weight: float = 0.0) -> Design:
    items = [Item(kind, rows.members(of), len(of), target) for kind, target, of in chosen]
    changes = [Change(item.ids, weight) for item in items]
    predicted = torch.stack([(1.0 - weight) * rows.scores[of].sum(0) for _, _, of in chosen])
    return Design(items, changes, predicted)


def _size(size: float, count: int) -> int:
    """A fraction below 1, or a number of rows, as a number of rows."""
    number = max(1, round(size * count)) if 0 < size < 1 else size
    if number != int(number) or not 1 <= number <= count:
        raise MismatchError(
            message("no such part of the rows", expected=f"a fraction in (0, 1) or 1 to {count}", got=size)
        )
    return int(number)
