"""The loaders of one recording: which there are, and how many passes each has begun."""

from collections.abc import Iterable
from typing import Any, final

from torch.utils.data import DataLoader

from hydragrad.errors import UnsupportedError, message
from hydragrad.trajectory.loaders import WatchedBatches, WatchedLoader

Watched = WatchedLoader | WatchedBatches


@final
class Sources:
    """Numbers loaders in the order of their appearance; passes over each count from ``epoch`` on."""

    def __init__(self) -> None:
        self.epoch = 0
        self._known: list[tuple[Any, Watched]] = []
        self._passes: list[int] = []

    @property
    def first(self) -> Watched | None:
        """The first loader."""
        return self._known[0][1] if self._known else None

    def begin(self, place: int) -> int:
        """A pass begins; its number."""
        epoch = self._passes[place]
        self._passes[place] += 1
        self._known[place][1].begin(epoch)
        return epoch

    def watch(self, loader: Iterable[Any], indices: Iterable[Any] | None) -> tuple[int, Watched]:
        """The number and the watched form of a loader; refused if its batches have no ids."""
        for place, (known, watched) in enumerate(self._known):
            if known is loader and indices is None:
                return place, watched
        if indices is not None:
            watched = WatchedBatches(loader, indices)
        elif isinstance(loader, DataLoader):
            watched = WatchedLoader(loader)
        else:
            raise UnsupportedError(
                message(
                    "the ids of these batches are unknown",
                    expected="a torch DataLoader",
                    got=type(loader).__name__,
                    remedy="recording.batches(iterable, indices=[[ids of batch 0], [ids of batch 1], ...])",
                )
            )
        return self._place(loader, watched), watched

    def _place(self, loader: Any, watched: Watched) -> int:
        """The number of a loader; batches with ids given by hand all count as one, whose passes are epochs."""
        by_hand = isinstance(watched, WatchedBatches)
        for place, (_, known) in enumerate(self._known):
            if by_hand and isinstance(known, WatchedBatches):
                return place
            if not by_hand and isinstance(known, WatchedLoader) and known.data is not watched.data:
                raise UnsupportedError(
                    message(
                        "loaders of different data sets in one recording",
                        expected="one data set, so that an id means one example",
                        got=f"{type(known.data).__name__} of {known.length}, {type(watched.data).__name__} "
                        f"of {watched.length}",
                        remedy="let both loaders sample from one data set (ConcatDataset and samplers)",
                    )
                )
        self._known.append((loader, watched))
        self._passes.append(self.epoch)
        return len(self._known) - 1
