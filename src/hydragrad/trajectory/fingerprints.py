"""Small fingerprints of what passed by: the content of each example, and each step's gradient."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, final

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors
from torch.utils import _pytree as pytree

_PLAIN = (str, bytes, bool, int, float, type(None))
_MIX = 0x9E3779B97F4A7C15 - (1 << 64)  # odd: multiplying by it loses nothing modulo 2**64
_SAMPLED = 256  # coordinates of each tensor that enter the projections
_BUCKET = 2**20  # elements copied together


def _splitmix(start: int, length: int) -> Tensor:
    """Pseudo-random int64 from consecutive counters: the same on every machine and torch version."""

    def shift(x: Tensor, bits: int) -> Tensor:  # logical, where >> would copy the sign bit
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    x = (torch.arange(start + 1, start + length + 1, dtype=torch.int64) * _MIX).clone()
    x = (x ^ shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ shift(x, 31)


@lru_cache(maxsize=64)
def _position_weights(length: int, dtype: torch.dtype, shape: torch.Size, device: torch.device) -> Tensor:
    """Odd weights [length], so that a change of one word always changes the weighted sum modulo 2**64.

    They differ by the rows' dtype and shape: the same number in another type is other content.
    """
    start = _hash((str(dtype), tuple(shape))) & (2**40 - 1)
    return (_splitmix(start, length) | 1).to(device)


def _weighted_sum(words: Tensor, weights: Tensor) -> Tensor:
    """Products words [b, W] . weights [W] modulo 2**64 (integer matrix products exist on the CPU only)."""
    if words.device.type == "cpu" and words.dtype == torch.int64:
        return torch.mv(words, weights)
    return (words * weights).sum(1)


def _row_digests(rows: Tensor) -> Tensor:
    """One int64 per row of ``rows`` [b, ...], from its bytes and their positions."""
    rows = rows.detach()
    if rows.layout != torch.strided or rows.is_nested:
        rows = rows.to_dense() if not rows.is_nested else rows.to_padded_tensor(0.0)
    if rows.is_complex():
        rows = torch.view_as_real(rows.resolve_conj())
    dtype, shape = rows.dtype, rows.shape[1:]
    rows = rows.contiguous().reshape(rows.shape[0], -1)
    if rows.shape[1] == 0:
        return torch.zeros(rows.shape[0], dtype=torch.int64, device=rows.device)
    if rows.storage_offset() % 8:
        rows = rows.clone()
    size = rows.shape[1] * rows.element_size()
    if size % 8 == 0:
        words = rows if rows.dtype == torch.int64 else rows.view(torch.int64)
        # Odd multiples of the top bit cancel in pairs (two flipped signs would pass): let it count lower down too.
        words = (words >> 32).add_(words)
    else:
        words = rows.view(torch.int32 if size % 4 == 0 else torch.uint8)
    return _weighted_sum(words, _position_weights(words.shape[1], dtype, shape, words.device))


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


def _row_parts(value: Any, examples: int) -> Iterator[Tensor]:
    """Digests [examples] (or [1], for what all examples share) of every part of a batch, in a fixed order."""
    if isinstance(value, Tensor):
        yield _row_digests(value) if value.dim() and value.shape[0] == examples else _whole_digest(value)
    elif isinstance(value, _PLAIN):
        yield _whole_digest(value)
    elif isinstance(value, (list, tuple)) and len(value) == examples and not _are_columns(value, examples):
        yield torch.cat([_whole_digest(part) for part in value])
    else:
        for part in _parts(value):
            yield from _row_parts(part, examples)


def _are_columns(parts: Sequence[Any], examples: int) -> bool:
    """Whether a sequence as long as the batch holds columns (tensors of all rows), not one entry per example."""
    return all(isinstance(part, Tensor) and part.dim() > 0 and part.shape[0] == examples for part in parts)


def batch_digests(batch: Any, examples: int) -> Tensor:
    """Content digests of a batch's examples, int64 [examples], on the batch's device (nothing is waited for).

    Every tensor with ``examples`` rows (and every list with one entry per example) counts per example; anything else
    counts for all of them alike. Example: ``batch_digests([images, labels], 64)``.
    """
    total: Tensor | None = None
    for digest in _row_parts(batch, examples):
        total = digest if total is None else total.to(digest.device) * _MIX + digest
    if total is None:
        total = torch.zeros(1, dtype=torch.int64)
    return total if total.shape[0] == examples else total.expand(examples).clone()


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


@final
class GradientFingerprint:
    """Norm and two random-sign projections of the gradients, float64 [3], kept on their device.

    The projections read at most 256 evenly strided coordinates of each tensor. Signs come from a fixed integer
    hash of a tensor's place among ``numels`` and of the coordinate, so that recording and replay agree without a seed.
    """

    def __init__(self, numels: Sequence[int]) -> None:
        self._numels = list(numels)
        self._plans: dict[tuple[tuple[int, ...], torch.device], list[_Bucket]] = {}

    @torch.no_grad()
    def __call__(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Fingerprint of ``grads``, one entry (or None) per tensor of ``numels``."""
        present = tuple(i for i, grad in enumerate(grads) if grad is not None)
        if not present:
            return torch.zeros(3, dtype=torch.float64)
        device = next(grad.device for grad in grads if grad is not None)
        key = (present, device)
        if key not in self._plans:
            self._plans[key] = self._plan(present, device)
        parts = [bucket.fingerprint([_dense(grads[i]) for i in bucket.members]) for bucket in self._plans[key]]
        if len(parts) == 1:
            return parts[0]
        stacked = torch.stack(parts)
        return torch.cat([stacked[:, :1].norm().reshape(1), stacked[:, 1:].sum(0)])

    def _plan(self, present: tuple[int, ...], device: torch.device) -> list["_Bucket"]:
        """Small tensors share a bucket: one copy and four operations for all of them."""
        buckets: list[list[int]] = [[]]
        for i in present:
            if buckets[-1] and sum(self._numels[j] for j in (*buckets[-1], i)) > _BUCKET:
                buckets.append([])
            buckets[-1].append(i)
        return [_Bucket.of(members, self._numels, device) for members in buckets]


@final
@dataclass(frozen=True)
class _Bucket:
    """Tensors that are fingerprinted together: their places, the coordinates read, the signs [2, coordinates]."""

    members: tuple[int, ...]
    coordinates: Tensor
    signs: Tensor

    @staticmethod
    def of(members: Sequence[int], numels: Sequence[int], device: torch.device) -> "_Bucket":
        coordinates, signs, start = [], [], 0
        for i in members:
            count = min(numels[i], _SAMPLED)
            stride = max(1, numels[i] // _SAMPLED)
            coordinates.append(torch.arange(count) * stride + start)
            signs.append(_splitmix(i << 32, 2 * count).view(2, -1).ge(0).double() * 2 - 1)
            start += numels[i]
        return _Bucket(tuple(members), torch.cat(coordinates).to(device), torch.cat(signs, 1).to(device))

    def fingerprint(self, grads: list[Tensor]) -> Tensor:
        flat = _flatten_dense_tensors(grads)
        samples = flat.index_select(0, self.coordinates).double()
        return torch.cat([torch.linalg.vector_norm(flat).double().reshape(1), self.signs @ samples])


def _dense(grad: Tensor | None) -> Tensor:
    assert grad is not None
    return grad if grad.layout == torch.strided else grad.to_dense()
