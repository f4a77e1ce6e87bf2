"""Random augmentation that comes out the same whenever the same example is asked for in the same epoch."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, final

from torch.utils.data import Dataset

from hydragrad.errors import UnsupportedError, message
from hydragrad.trajectory.randomness import Seeding, number_of, seeded


@final
class EpochIndex(int):
    """The position of an example, with the epoch in which it is asked for; both survive the way to a worker process."""

    epoch: int

    def __new__(cls, position: int, epoch: int) -> "EpochIndex":
        made = super().__new__(cls, position)
        made.epoch = epoch
        return made

    def __reduce__(self) -> Any:
        return EpochIndex, (int(self), self.epoch)


@final
class EpochIndices(list[int]):
    """Positions of a batch's examples, with their epoch: one object for all, made in a moment."""

    epoch: int = 0

    @staticmethod
    def of(positions: Sequence[Any], epoch: int) -> "EpochIndices":
        made = EpochIndices(positions)
        made.epoch = epoch
        return made


@final
class Augmented(Dataset):
    """A map-style data set whose random augmentation can be repeated: example i of epoch e is always the same.

        sample = dataset[i], drawn with torch, numpy and Python seeded from (seed, e, i)

    Different epochs differ. While recording, the epoch is the pass over the loader (or over others that take turns with
    it); elsewhere (queries, ``train_set[3]``) it is 0. The caller's random states stay as they were, in workers too. It
    must be the outermost data set; generators of the data set's own are not seeded.
    Example: ``train_set = hydragrad.Augmented(train_set)``, for the loader and for ``hydragrad.load``.
    """

    def __init__(self, dataset: Any, seed: int = 0) -> None:
        self.dataset, self.seed = dataset, seed
        self._seeding = Seeding()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, (list, tuple)):
            return self.__getitems__([index])[0]
        positions = [int(i) % len(self) for i in index]
        with seeded("augmented", self.seed, getattr(index, "epoch", 0), positions):
            return self.dataset[positions]

    def __getitems__(self, indices: Sequence[Any]) -> list[Any]:
        """The examples one by one; a DataLoader asks for a batch so, and the generators are put back once for all."""
        positions, length = [int(index) for index in indices], len(self)
        if isinstance(indices, EpochIndices):
            base = _base(self.seed, indices.epoch)
            numbers = [(base + position % length * _ODD) & _LOWEST for position in positions]
        else:
            bases = [_base(self.seed, getattr(index, "epoch", 0)) for index in indices]
            places = zip(bases, positions, strict=True)
            numbers = [(base + position % length * _ODD) & _LOWEST for base, position in places]
        return self._seeding.each(self.dataset.__getitem__, positions, numbers)


_LOWEST = 2**64 - 1
_ODD = 0x9E3779B97F4A7C15
"""Odd: positions that differ in their lowest 32 bits, all that torch takes of a seed, give seeds that do."""


@lru_cache(maxsize=64)
def _base(seed: int, epoch: int) -> int:
    return number_of("augmented", seed, epoch)


def in_epoch(data: Any, index: Any, epoch: int) -> Any:
    """What to ask ``data`` for: ``index`` (a position or a sequence of them), with the epoch if it can use that."""
    if not isinstance(data, Augmented):
        return index
    if isinstance(index, int):
        return EpochIndex(index, epoch)
    return EpochIndices.of(index, epoch)


def refuse_hidden(data: Any) -> None:
    """Refuse an Augmented below another data set, which would lose the epoch on the way."""
    below = [getattr(data, "dataset", None), *(getattr(data, "datasets", None) or ())]
    for part in below if not isinstance(data, Augmented) else ():
        if isinstance(part, Augmented):
            raise UnsupportedError(
                message(
                    "hydragrad.Augmented is not the outermost data set",
                    expected="Augmented(Subset(...)), Augmented(ConcatDataset(...))",
                    got=f"{type(data).__name__} of an Augmented",
                    cause="the data set around it hands on plain positions, so that every epoch would look alike",
                    remedy="wrap the whole data set last: hydragrad.Augmented(dataset)",
                )
            )
        if part is not None:
            refuse_hidden(part)
