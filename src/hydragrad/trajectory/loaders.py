"""Watching a torch DataLoader: which ids each batch holds, without changing a batch or a random number."""

import array
import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import Any, final

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, default_collate, default_convert

from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.trajectory.augmentation import in_epoch, refuse_hidden

_BY_HAND = "give the ids yourself: recording.batches(iterable, indices=[[ids of batch 0], [ids of batch 1], ...])"


Ids = Tensor | array.array
"""Of a batch: int64 [b]; as an array where there is no time for a tensor yet."""


def id_tensor(ids: Ids) -> Tensor:
    """int64 [b]."""
    return ids if isinstance(ids, Tensor) else torch.frombuffer(ids, dtype=torch.int64)


def as_ids(index: Any, length: int | None) -> Ids:
    """The ids that a sampler yielded for one batch (an int or a sequence of ints), non-negative."""
    if type(index) is list and index and length is not None:
        try:
            plain = array.array("q", index)
        except (TypeError, OverflowError):
            pass  # for the slower way to say what they are
        else:
            if min(index) >= 0 and max(index) < length:
                return plain
    try:
        ids = np.array(index.detach().cpu().numpy() if isinstance(index, Tensor) else index).reshape(-1)
        if ids.size and ids.dtype.kind not in "iu":
            raise TypeError(f"ids of {ids.dtype}")
        ids = ids.astype(np.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise UnsupportedError(
            message("the sampler does not yield integer ids", expected="ints", got=repr(index)[:80], remedy=_BY_HAND)
        ) from error
    if length is not None and ids.size:
        if ids.min() < 0:
            ids = np.where(ids < 0, ids + length, ids)
        if ids.min() < 0 or ids.max() >= length:
            raise MismatchError(
                message("an id lies outside the data", expected=f"0 to {length - 1}", got=f"{ids.tolist()[:8]}")
            )
    return torch.from_numpy(ids)


@final
class _NotingSampler:
    """The loader's own index sampler, which notes each index list it hands out, to augmented data with the epoch."""

    def __init__(self, sampler: Any, data: Any) -> None:
        self._sampler, self._data, self._length = sampler, data, len(data)
        self.epoch = 0
        self.noted: deque[tuple[Ids, str]] = deque()

    def __iter__(self) -> Iterator[Any]:
        self.noted = noted = deque()  # a new pass; what an abandoned one prefetched is forgotten
        for index in self._sampler:
            noted.append((as_ids(index, self._length), "index" if isinstance(index, int) else "indices"))
            yield in_epoch(self._data, index, self.epoch)

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in ("noted", "epoch"):
            raise AttributeError(name)
        return getattr(self._sampler, name)


@final
class WatchedLoader:
    """Iterates a shallow copy of a DataLoader whose sampler is noted; yields (ids, batch).

    The copy shares sampler, generator and data set, so samplers and the base seed draw exactly what they would draw
    without it. ``mode`` says how a batch is fetched again: see BatchSource.
    """

    def __init__(self, loader: DataLoader) -> None:
        _refuse_unwatchable(loader)
        self.loader, self.data = loader, loader.dataset
        self.length = len(loader.dataset)  # type: ignore[arg-type]
        self._sampler = _NotingSampler(loader._index_sampler, self.data)
        self._copy = copy.copy(loader)
        batched = loader.batch_sampler is not None
        self._copy.__dict__["batch_sampler" if batched else "sampler"] = self._sampler
        self.mode = "samples" if batched else "indices"
        function: Callable[..., Any] = loader.collate_fn
        self.collate = {
            "default": function is default_collate or (not batched and function is default_convert),
            "function": f"{function.__module__}.{getattr(function, '__qualname__', type(function).__qualname__)}",
        }

    def __len__(self) -> int:
        return len(self.loader)

    @property
    def kind(self) -> Any:
        """Tells loaders apart that take turns, where each is made anew for every epoch."""
        sampler = self.loader.sampler
        return type(sampler), len(sampler) if isinstance(sampler, Sized) else None, self.loader.batch_size

    def begin(self, epoch: int) -> None:
        """The next pass is this epoch."""
        self._sampler.epoch = epoch

    def __iter__(self) -> Iterator[tuple[Ids, Any]]:
        self._share_workers(self.loader, self._copy, self._sampler)
        try:
            for batch in self._copy:
                if not self._sampler.noted:
                    raise UnsupportedError(
                        message(
                            "the loader yields more batches than its sampler made index lists",
                            cause=f"{type(self.loader).__name__} iterates in a way of its own",
                            remedy=_BY_HAND,
                        )
                    )
                ids, kind = self._sampler.noted.popleft()
                if self.mode != "samples":
                    self.mode = kind
                yield ids, batch
        finally:
            self._share_workers(self._copy, self.loader, self.loader._index_sampler)

    @staticmethod
    def _share_workers(source: DataLoader, target: DataLoader, sampler: Any) -> None:
        """Hand persistent workers over: a second set of workers would draw a second base seed."""
        target._iterator = source._iterator
        if target._iterator is not None:
            target._iterator._index_sampler = sampler


def _refuse_unwatchable(loader: DataLoader) -> None:
    if isinstance(loader.dataset, IterableDataset) or not hasattr(loader.dataset, "__len__"):
        raise UnsupportedError(
            message(
                "examples of an iterable data set have no ids",
                expected="a map-style data set (__len__ and __getitem__)",
                got=type(loader.dataset).__name__,
                remedy=_BY_HAND,
            )
        )
    refuse_hidden(loader.dataset)
    if loader.num_workers > 0 and not getattr(loader, "in_order", True):
        raise UnsupportedError(
            message(
                "batches that arrive out of order cannot be matched with their ids",
                expected="in_order=True",
                got=f"in_order=False with {loader.num_workers} workers",
                remedy=f"set in_order=True, or {_BY_HAND}",
            )
        )


@final
class WatchedBatches:
    """Batches from anywhere, with ids given beside them; yields (ids, batch)."""

    def __init__(self, batches: Iterable[Any], indices: Iterable[Any]) -> None:
        self.mode, self.length = "samples", None
        self.collate = {"default": True, "function": "given by hand"}
        self.kind = None
        self._batches, self._indices = batches, indices

    def __len__(self) -> int:
        return len(self._batches)  # type: ignore[arg-type]

    def begin(self, epoch: int) -> None:
        """The next pass is this epoch; batches that are made elsewhere know that themselves."""

    def __iter__(self) -> Iterator[tuple[Ids, Any]]:
        indices, missing = iter(self._indices), object()
        for count, batch in enumerate(self._batches):
            index = next(indices, missing)
            if index is missing:
                raise MismatchError(
                    message("fewer id lists than batches", expected="one list of ids for each batch", got=f"{count}")
                )
            yield as_ids(index, None), batch
