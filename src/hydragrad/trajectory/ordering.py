"""Whether a collate function keeps its examples in order: row k of a batch must be the k-th example asked for.

    make(reversed ids) = reversed make(ids)        row by row, bit for bit

Every score is given to an id by its place in the batch, in the recording, in replays and in sweeps alike, so that all
of them would agree on the scores of the wrong examples.
"""

import copy
from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor

from hydragrad.errors import UnsupportedError, message
from hydragrad.trajectory.digests import digests_by_example, row_wise
from hydragrad.trajectory.randomness import undisturbed

LOOKED_AT = 4
"""The first so many batches each."""


@final
class OrderWatch:
    """Looks at the first few batches that are made, then at ever fewer: the 8th, the 16th, and so on."""

    def __init__(self) -> None:
        self._made = 0

    def made(self, make: Callable[[Any], Any], parts: Any) -> Any:
        """``make(parts)``, a batch of as many examples; UnsupportedError if it shows that their rows were reordered."""
        if not self._due(len(parts)):
            return make(parts)
        turned = [copy.copy(part) for part in reversed(parts)]
        batch = make(parts)  # which may take its samples apart, or sort them in place
        with undisturbed():
            try:
                reordered = _reordered(batch, make(turned), len(turned))
            except Exception:  # the user's code may insist on an order (sorted lengths): then it makes none of its own
                return batch
        if reordered:
            raise UnsupportedError(_told(len(turned)))
        return batch

    def _due(self, examples: int) -> bool:
        if examples < 2:
            return False
        self._made += 1
        return self._made <= LOOKED_AT or not self._made & (self._made - 1)


def _reordered(batch: Any, other: Any, examples: int) -> bool:
    """Whether rows of ``other``, made of the same examples turned round, did not turn round with them.

    Parts that are no example's own (a mask as long as the batch, offsets) come out as before whatever the order. So one
    part whose rows did follow the examples outweighs all others. What has other rows each time it is made (mixup, masks
    drawn at random) says nothing.
    """
    pairs = _same_rows(batch, other, examples)
    if any(torch.equal(b, a.flip(0)) and not torch.equal(a, b) for a, b in pairs):
        return False
    return any(not torch.equal(b, a.flip(0)) for a, b in pairs)


def _same_rows(batch: Any, other: Any, examples: int) -> list[tuple[Tensor, Tensor]]:
    """Of every part that has the same rows in both, in whatever order: a digest per row."""
    before, after = _rows(batch, examples), _rows(other, examples)
    if len(before) != len(after):
        return []
    return [(a, b) for a, b in zip(before, after, strict=True) if torch.equal(a.sort().values, b.sort().values)]


def _rows(batch: Any, examples: int) -> list[Tensor]:
    """A digest per row [examples] of every part that has a row (or an entry) for each example."""
    parts = [part for part, rows in row_wise(batch, examples) if rows]
    judged = [part for part in parts if _alike(part) and not _is_count(part, examples)]
    return [digests_by_example(part).cpu() for part in judged]


def _alike(part: Any) -> bool:
    """Whether its entries are of one kind: a tuple may have as many fields as there are examples by accident."""
    return isinstance(part, Tensor) or len({_kind(entry) for entry in part}) == 1


def _kind(entry: Any) -> Any:
    return (entry.dtype, entry.dim()) if isinstance(entry, Tensor) else type(entry)


def _is_count(part: Any, examples: int) -> bool:
    """Whether a part only counts: positions in some order (of packed sequences), or offsets into what is laid flat."""
    if not isinstance(part, Tensor) or part.dim() != 1 or part.is_floating_point() or part.dtype == torch.bool:
        return False
    numbers = part.tolist()
    return sorted(numbers) == list(range(examples)) or (numbers[0] == 0 and numbers == sorted(numbers))


def _told(examples: int) -> str:
    return message(
        "collate_fn reorders its examples, so that scores would be given to others",
        expected=f"row k of a batch to be the k-th of its {examples} examples: reversed examples, reversed rows",
        got="the rows in another order",
        cause="collate_fn (or a data set that is asked for whole batches) sorts its examples by length, or shuffles",
        remedy="leave them in the order given (pack_padded_sequence(..., enforce_sorted=False) needs no other), or let "
        "the batch sampler, or recording.batches(batches, indices=ids), give the ids in the order of the rows; then "
        "record again",
    )
