"""Content digests: one number for each example of a batch, from the bytes of all that belongs to it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_PLAIN = (str, bytes, bool, int, float, type(None))
_LONG = 128  # words of a row
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: multiplying by it loses nothing modulo 2**64


def splitmix(start: int, length: int) -> Tensor:
    """Pseudo-random int64 from consecutive counters: the same on every machine and torch version."""

    def shift(x: Tensor, bits: int) -> Tensor:  # logical, where >> would copy the sign bit
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (torch.arange(start + 1, start + length + 1, dtype=torch.int64) * _MIX).clone()
    x = (x ^ shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ shift(x, 31)


def _position_weights(length: int, dtype: torch.dtype, shape: torch.Size, device: torch.device) -> Tensor:
    """Odd weights [length], so that a change of one word always changes the weighted sum modulo 2**64.

    They differ by the rows' dtype and shape: the same number in another type is other content.
    """
    start = _hash((str(dtype), tuple(shape))) & (2**40 - 1)
    return (splitmix(start, length) | 1).to(device)


def _row_digests(rows: Tensor) -> Tensor:
    """One int64 per row of ``rows`` [b, ...], from its bytes and their positions."""
    if rows.layout != torch.strided or rows.is_nested:
        rows = rows.to_dense() if not rows.is_nested else rows.to_padded_tensor(0.0)
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj())
    if rows.storage_offset() % 8:
        rows = rows.clone()
    scheme = _scheme(rows.dtype, rows.shape[1:], rows.device)
    if scheme is None:
        return torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    words = rows.detach().reshape(rows.shape[0], -1)
    if words.dtype != scheme.unit:
        words = words.contiguous().view(scheme.unit)
    if scheme.single is not None:
        return words[:, 0] * scheme.single
    if scheme.mixed:
        words = (words >> 32).add_(words)
    if scheme.integer_products:
        return torch.mv(words, scheme.weights)
    return (words * scheme.weights).sum(1)


@final
@dataclass(frozen=True)
class _Scheme:
    """How rows of one dtype and shape are read: as words of ``unit``, weighted; ``single``: the weight of a lone word.

    Odd multiples of the top bit cancel in pairs. ``mixed``: it is made to count lower down too, so that two flipped
    signs do not pass. In long rows of small numbers that could only miss flipped signs of every second (or fourth,
    or eighth) number alone, an even count of them in every row, and is left out: reading is what costs.
    """

    unit: torch.dtype
    weights: Tensor
    single: int | None
    mixed: bool
    integer_products: bool
    """Matrix products of integers exist on the CPU only."""


@lru_cache(maxsize=64)
def _scheme(dtype: torch.dtype, shape: torch.Size, device: torch.device) -> _Scheme | None:
    size = shape.numel() * dtype.itemsize
    if not size:
        return None
    unit = torch.int64 if size % 8 == 0 else torch.int32 if size % 4 == 0 else torch.uint8
    count, wide = size // unit.itemsize, unit == torch.int64
    weights = _position_weights(count, dtype, shape, device)
    single = int(weights[0]) if count == 1 and wide else None
    mixed = wide and (dtype.itemsize == 8 or count < _LONG)
    return _Scheme(unit, weights, single, mixed, wide and device.type == "cpu")


def _hash(value: Any) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def _whole_digest(value: Any) -> Tensor:
    """One int64 [1] for a value that does not fall into rows."""
    if isinstance(value, Tensor):
        return _row_digests(value.reshape(1, *value.shape)) + _hash((tuple(value.shape), str(value.dtype)))
    if isinstance(value, _PLAIN):
        return torch.tensor([_hash(value)])
    total = torch.tensor([_hash(type(value).__name__)])
    for part in _parts(value):
        digest = _whole_digest(part)
        total = total.to(digest.device) * _MIX + digest
    return total


def _parts(value: Any) -> Sequence[Any]:
    if isinstance(value, Mapping):
        return [part for key in value for part in (str(key), value[key])]
    if isinstance(value, (list, tuple)):
        return value
    if hasattr(value, "__array__"):
        return [torch.as_tensor(value.__array__())]
    return list(vars(value).values()) if hasattr(value, "__dict__") else []


def row_wise(value: Any, examples: int) -> Iterator[tuple[Any, bool]]:
    """The parts of a batch in a fixed order, and whether each has a row or an entry for every example."""
    if isinstance(value, Tensor):
        yield value, value.dim() > 0 and value.shape[0] == examples
    elif isinstance(value, _PLAIN):
        yield value, False
    elif isinstance(value, (list, tuple)) and len(value) == examples and not _are_columns(value, examples):
        yield value, True
    else:
        for part in _parts(value):
            yield from row_wise(part, examples)


def digests_by_example(part: Any) -> Tensor:
    """Digests [examples] of a part that has a row or an entry for every example."""
    return _row_digests(part) if isinstance(part, Tensor) else torch.cat([_whole_digest(entry) for entry in part])


def _are_columns(parts: Sequence[Any], examples: int) -> bool:
    """Whether a sequence as long as the batch holds columns (tensors of all rows), not one entry per example."""
    return all(isinstance(part, Tensor) and part.dim() > 0 and part.shape[0] == examples for part in parts)


def batch_digests(batch: Any, examples: int) -> Tensor:
    """Content digests of a batch's examples, int64 [examples], on the batch's device (nothing is waited for).

    Every tensor with ``examples`` rows (and every list with one entry per example) counts per example; anything else
    counts for all of them alike. Example: ``batch_digests([images, labels], 64)``.
    """
    if (
        isinstance(batch, (list, tuple))
        and len(batch) == 2
        and (pair := _pair_digests(batch[0], batch[1], examples)) is not None
    ):
        return pair
    total: Tensor | None = None
    for part, rows in row_wise(batch, examples):
        digest = digests_by_example(part) if rows else _whole_digest(part)
        total = digest if total is None else torch.add(digest, total.to(digest.device), alpha=_MIX)
    if total is None:
        total = torch.zeros(1, dtype=torch.int64)
    return total if total.shape[0] == examples else total.expand(examples).clone()


def _pair_digests(rows: Any, labels: Any, examples: int) -> Tensor | None:
    """Of rows and a number for each of them on the CPU, as below in a single operation; None: it is another batch.

    While a model trains it is not the arithmetic that costs, but whatever code has left the cache meanwhile.
    """
    if type(rows) is not Tensor or type(labels) is not Tensor or rows.requires_grad or labels.requires_grad:
        return None
    scheme = _pair_scheme(rows.dtype, rows.shape, labels.dtype, labels.shape, rows.device, labels.device)
    if scheme is None or len(rows) != examples:
        return None
    try:
        words, ones = rows.view(examples, -1).view(scheme[0].unit), labels.view(scheme[1].unit).view(examples)
    except RuntimeError:  # a memory layout that has to be copied first
        return None
    assert scheme[1].single is not None
    return torch.addmv(ones, words, scheme[0].weights, beta=scheme[1].single, alpha=_MIX)


@lru_cache(maxsize=64)
def _pair_scheme(
    dtype: torch.dtype,
    shape: torch.Size,
    label_dtype: torch.dtype,
    label_shape: torch.Size,
    device: torch.device,
    label_device: torch.device,
) -> "tuple[_Scheme, _Scheme] | None":
    if not shape or shape[:1] != label_shape[:1] or dtype.is_complex or label_dtype.is_complex:
        return None
    rows, labels = _scheme(dtype, shape[1:], device), _scheme(label_dtype, label_shape[1:], label_device)
    if rows is None or labels is None or labels.single is None or label_device.type != "cpu":
        return None
    plain = rows.integer_products and not rows.mixed and rows.single is None
    return (rows, labels) if plain else None


def describe_batch(batch: Any) -> list[dict[str, Any]]:
    """The leaves of a batch: path, dtype (or Python type) and shape without the leading dimension."""
    leaves = []
    for path, leaf in pytree.tree_flatten_with_path(batch)[0]:
        tensor = isinstance(leaf, Tensor)
        leaves.append(
            {
                "path": pytree.keystr(path),
                "dtype": str(leaf.dtype).removeprefix("torch.") if tensor else type(leaf).__name__,
                "shape": list(leaf.shape[1:]) if tensor else None,
            }
        )
    return leaves[:64]
