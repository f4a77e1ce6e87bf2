"""Layers in plain operations, where torch's kernel has no second derivative or a wrong one; no checkpointing."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint

Forms = dict[Any, Callable[..., Any]]
"""torch's function -> what is called in its place."""


def forms_needed(module: nn.Module) -> Forms:
    """What the layers of ``module`` need in plain operations."""
    needed: Forms = {}
    for part in module.modules():
        if type(part).__name__ == "_WeightNorm" or hooked(part, "WeightNorm"):
            needed[torch._weight_norm] = _weight_norm  # pyright: ignore[reportPrivateImportUsage]
        elif isinstance(part, nn.EmbeddingBag) and _is_plain(part.mode, part.max_norm, part.scale_grad_by_freq):
            needed[F.embedding_bag] = _embedding_bag
        elif isinstance(part, nn.Embedding) and part.sparse:
            needed[F.embedding] = _embedding
    return needed


def hooked(part: nn.Module, kind: str) -> bool:
    """Whether ``torch.nn.utils.weight_norm`` or ``spectral_norm`` (the older ones) computes a weight of ``part``."""
    return any(type(hook).__name__ == kind for hook in part._forward_pre_hooks.values())


def plain_forms(needed: Forms) -> contextlib.AbstractContextManager[Any]:
    """Within: those run in plain operations. Nothing is done where none is needed: it costs time at every operation."""
    return _Replaced(needed) if needed else contextlib.nullcontext()


@contextlib.contextmanager
def activations_kept() -> Iterator[None]:
    """Within: ``torch.utils.checkpoint`` keeps activations as if it were not there.

    What it would run again in a backward pass would run with the module's own parameters, not with those that are
    differentiated, and would draw once more. Where torch names its parts otherwise, nothing is changed here: the
    gradient that comes out is then found to be another one.
    """
    plain: dict[str, Any] = {"_checkpoint_without_reentrant_generator": _once, "CheckpointFunction": _Direct}
    kept = {name: getattr(checkpoint, name) for name in plain if hasattr(checkpoint, name)}
    try:
        for name in kept:
            setattr(checkpoint, name, plain[name])
        yield
    finally:
        for name, value in kept.items():
            setattr(checkpoint, name, value)


def _once(*args: Any, **kwargs: Any) -> Iterator[None]:
    """The function is called where this stands still."""
    yield


@final
class _Direct:
    """In place of the autograd function that the reentrant form applies."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *args: Any) -> Any:
        return function(*args)


@final
class _Replaced(TorchFunctionMode):
    """While it lasts, other functions are called in place of some."""

    def __init__(self, forms: Forms) -> None:
        super().__init__()
        self._forms = forms

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._forms.get(func, func)(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """The weight g v / ||v||: the fused kernel's second derivative is wrong (seen with torch 2.13 on CPU)."""
    return v * (g / torch.norm_except_dim(v, 2, dim))


def _embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """With a dense gradient: a sparse one has hardly any operations."""
    return F.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq)


def _is_plain(mode: str, max_norm: float | None, scale_grad_by_freq: bool) -> bool:
    return mode != "max" and max_norm is None and not scale_grad_by_freq


def _embedding_bag(
    input: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Sums or means of the embeddings of each bag; the kernel's backward pass has no derivative."""
    if not _is_plain(mode, max_norm, scale_grad_by_freq):  # another layer's than the one that needed this
        given = (offsets, max_norm, norm_type, scale_grad_by_freq, mode, sparse, per_sample_weights)
        return F.embedding_bag(input, weight, *given, include_last_offset, padding_idx)
    if input.dim() == 2:
        bags, length = input.shape
        owner = torch.arange(bags, device=input.device).repeat_interleave(length)
    else:
        assert offsets is not None
        starts = offsets[:-1] if include_last_offset else offsets
        bags, places = len(starts), torch.arange(len(input), device=input.device, dtype=starts.dtype)
        owner = (
            torch.searchsorted(starts.contiguous(), places, right=True) - 1
        )  # behind empty bags, which share a start
    ids = input.reshape(-1)
    rows = F.embedding(ids, weight)
    if padding_idx is None:
        counted = torch.ones_like(ids, dtype=weight.dtype)
    else:
        counted = (ids != padding_idx % len(weight)).to(weight.dtype)
    scale = counted if per_sample_weights is None else counted * per_sample_weights.reshape(-1)
    total = rows.new_zeros(bags, weight.shape[1]).index_add(0, owner, rows * scale[:, None])
    if mode == "sum":
        return total
    counts = counted.new_zeros(bags).index_add(0, owner, counted)
    return total / counts.clamp(min=1)[:, None]
