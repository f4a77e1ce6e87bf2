"""From ids to batches, as the recorded loader made them, on the model's device."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Subset, TensorDataset, default_collate

from hydragrad.errors import MismatchError, message
from hydragrad.trajectory.augmentation import Augmented, in_epoch
from hydragrad.trajectory.digests import batch_digests
from hydragrad.trajectory.ordering import OrderWatch

_CACHE_BYTES = 256 * 2**20


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on ``device``, whatever containers it is made of."""
    if isinstance(batch, list) and all(isinstance(part, Tensor) for part in batch):  # the common case, ten times faster
        return [tensor.to(device, non_blocking=True) for tensor in batch]
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to(device, non_blocking=True), batch)


@final
class BatchSource:
    """Makes batches from ids: ``collate([data[i] for i in ids])``, moved to ``device``.

    ``mode``: ``"samples"`` as above (a DataLoader with a batch size); ``"index"`` collate(data[i]) and ``"indices"``
    collate(data[ids]) for a loader with ``batch_size=None``. With torch's default collate, tensors of a
    TensorDataset are indexed directly, and rows of other small data are kept once made, so later epochs only index.
    Example: ``BatchSource(data, default_collate, device).fetch(torch.tensor([3, 1]))``.
    """

    def __init__(
        self, data: Any, collate: Callable[[Any], Any], device: torch.device | str = "cpu", mode: str = "samples"
    ) -> None:
        self._data, self._collate, self._mode = data, collate, mode
        self.device = torch.device(device)
        direct = mode == "samples" and collate is default_collate
        self._tensors, self._positions = _as_tensors(data, self.device) if direct else (None, None)
        kept = direct and self._tensors is None and not isinstance(data, Augmented)  # which differs by epoch
        self._rows = _RowCache(len(data)) if kept else None
        self._own, self._order = collate is not default_collate, OrderWatch()

    def fetch(self, ids: Tensor, *, epoch: int = 0, fresh: bool = False) -> Any:
        """The batch of ``ids`` (int64 [b]) on the device; ``fresh`` asks the data again, past every cache.

        ``epoch`` matters to augmented data alone.
        """
        if not fresh and self._tensors is not None:
            rows = ids if self._positions is None else self._positions[ids]
            return [tensor.index_select(0, rows.to(tensor.device)).to(self.device) for tensor in self._tensors]
        if self._rows is None:
            return to_device(self._collated(ids.tolist(), epoch), self.device)
        batch = None if fresh else self._rows.get(ids)
        if batch is None:
            batch = self._collated(ids.tolist(), epoch)
            self._rows.put(ids, batch)
        return to_device(batch, self.device)

    def draws(self, ids: Tensor, epoch: int) -> bool:
        """Whether it is the collate function that makes other content each time, of the same samples."""
        if self._mode != "samples" or not self._own:
            return False
        samples = [self._data[i] for i in in_epoch(self._data, ids.tolist(), epoch)]
        one, other = (self._collate([copy.copy(sample) for sample in samples]) for _ in range(2))
        return not torch.equal(batch_digests(one, len(ids)), batch_digests(other, len(ids)))

    def _collated(self, ids: Sequence[int], epoch: int) -> Any:
        try:
            if self._mode == "index":
                return self._collate(self._data[in_epoch(self._data, ids[0], epoch)])
            if self._mode == "indices":
                return self._order.made(lambda ids: self._collate(self._data[in_epoch(self._data, ids, epoch)]), ids)
            asked, many = in_epoch(self._data, ids, epoch), getattr(self._data, "__getitems__", None)
            if many is not None and not _one_by_one(self._data):
                return self._order.made(lambda ids: self._collate(many(ids)), ids)
            samples = many(asked) if many else [self._data[i] for i in asked]
            return self._order.made(self._collate, samples) if self._own else self._collate(samples)
        except IndexError as error:
            raise MismatchError(
                message(
                    f"the data has no example among {list(ids)[:8]}",
                    expected="every recorded id",
                    got=f"data of length {len(self._data)}",
                    remedy="give the data set that the recorded loader read",
                )
            ) from error


def _one_by_one(data: Any) -> bool:
    """Whether ``__getitems__`` is torch's or ours, and gives a list of samples."""
    while type(data) is Subset:
        data = data.dataset
    return isinstance(data, Augmented) or not hasattr(data, "__getitems__")


def _as_tensors(data: Any, device: torch.device) -> tuple[tuple[Tensor, ...] | None, Tensor | None]:
    """The tensors behind a TensorDataset (through any Subsets, whose positions are composed), else None."""
    positions: Tensor | None = None
    while type(data) is Subset:
        indices = torch.as_tensor(data.indices, dtype=torch.int64)
        positions = indices if positions is None else indices[positions]
        data = data.dataset
    if type(data) is not TensorDataset:
        return None, None
    tensors = data.tensors
    if device.type != "cpu" and sum(t.numel() * t.element_size() for t in tensors) <= _CACHE_BYTES:
        tensors = tuple(tensor.to(device) for tensor in tensors)
    return tensors, positions


@final
class _RowCache:
    """Rows of collated batches by example, filled as they pass; gives up on data that has no equal rows."""

    def __init__(self, length: int) -> None:
        self._known = torch.zeros(length, dtype=torch.bool)
        self._columns: list[Tensor] | None = None
        self._tree: Any = None
        self._off = False

    def get(self, ids: Tensor) -> Any:
        if self._off or self._columns is None or not bool(self._known[ids].all()):
            return None
        return pytree.tree_unflatten([column[ids] for column in self._columns], self._tree)

    def put(self, ids: Tensor, batch: Any) -> None:
        if self._off:
            return
        leaves, tree = pytree.tree_flatten(batch)
        if self._columns is None:
            self._columns, self._tree = self._allocate(leaves, len(ids)), tree
        if self._columns is None or not self._fits(leaves, tree, len(ids)):
            self._off, self._columns = True, None
            return
        for column, leaf in zip(self._columns, leaves, strict=True):
            column[ids] = leaf
        self._known[ids] = True

    def _allocate(self, leaves: list[Any], examples: int) -> list[Tensor] | None:
        for leaf in leaves:
            if (
                not isinstance(leaf, Tensor)
                or leaf.dim() == 0
                or leaf.shape[0] != examples
                or leaf.device.type != "cpu"
            ):
                return None
        length = len(self._known)
        if sum(leaf[0].numel() * leaf.element_size() for leaf in leaves) * length > _CACHE_BYTES:
            return None
        return [torch.empty((length, *leaf.shape[1:]), dtype=leaf.dtype) for leaf in leaves]

    def _fits(self, leaves: list[Any], tree: Any, examples: int) -> bool:
        assert self._columns is not None
        return tree == self._tree and all(
            isinstance(leaf, Tensor)
            and leaf.shape == (examples, *column.shape[1:])
            and leaf.dtype == column.dtype
            and leaf.layout == torch.strided
            for leaf, column in zip(leaves, self._columns, strict=True)
        )
