"""Watching a model while it is trained: whether it ran on a batch, under which autocast, in which modes."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import nn


@final
@dataclass(frozen=True)
class Autocast:
    """The mixed precision that the model's forward pass ran under: ``dtype`` as in "bfloat16".

    ``backward``: the backward pass ran under it too, and casts its own operations.
    """

    device_type: str
    dtype: str
    cache: bool = True
    backward: bool = False

    @staticmethod
    def now(device_type: str) -> "Autocast | None":
        """What is in force; None: autocast is off."""
        if not torch.is_autocast_enabled(device_type):
            return None
        dtype = str(torch.get_autocast_dtype(device_type)).removeprefix("torch.")
        return Autocast(device_type, dtype, torch.is_autocast_cache_enabled())


def autocast_as(recorded: Autocast | None, device_type: str) -> Any:
    """A context with the recorded autocast; None: off, whatever the caller is in."""
    if recorded is not None:
        dtype = getattr(torch, recorded.dtype)
        return torch.autocast(recorded.device_type, dtype=dtype, cache_enabled=recorded.cache)
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def unwrapped(model: nn.Module) -> nn.Module:
    """The module that was given to torch.compile, if this is what came back; else the model itself."""
    while type(model).__name__ == "OptimizedModule" and isinstance(
        inner := getattr(model, "_orig_mod", None), nn.Module
    ):
        model = inner
    return model


def is_compiled(model: nn.Module) -> bool:
    """By torch.compile(model) or by model.compile()."""
    called = getattr(model, "_compiled_call_impl", None)
    return unwrapped(model) is not model or (called.compiled if isinstance(called, _Seen) else called) is not None


@final
class Modes:
    """Training or evaluation mode of every submodule; the same mapping until one changes."""

    def __init__(self, model: nn.Module) -> None:
        self._names, modules = zip(*model.named_modules(), strict=True)
        self._held = [vars(module) for module in modules]  # a tenth of the time of asking every module
        self._last: tuple[list[bool], dict[str, bool]] = ([], {})

    def now(self) -> dict[str, bool]:
        """Submodule name -> training."""
        training = [held["training"] for held in self._held]
        if training != self._last[0]:
            self._last = (training, dict(zip(self._names, training, strict=True)))
        return self._last[1]


@final
@dataclass(frozen=True)
class Ran:
    """What a batch did to the model: the autocast of its forward pass; the modes if it changed buffers, else None."""

    autocast: Autocast | None
    modes: Mapping[str, bool] | None


_PLAINLY = Ran(None, None)


@final
class _Seen:
    """A module's call, which says so first; in its place, where copies of the module do not take it along.

    A hook would be compiled into a compiled module, and takes the longer way through torch in any other.
    """

    def __init__(self, model: nn.Module, seen: Callable[[], None]) -> None:
        self.compiled: Callable[..., Any] | None = model.__dict__.get("_compiled_call_impl")
        self._call, self._seen = self.compiled or model._call_impl, seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self._seen()
        return self._call(*args, **kwargs)


@final
class ModelWatch:
    """Follows the model from batch to batch: its calls are seen before they are made."""

    def __init__(self, model: nn.Module, plain: nn.Module, modes: Modes, device: torch.device) -> None:
        self._model, self._modes, self._device = model, modes, device
        self._holders = [part for part in plain.modules() if part._buffers]
        self._autocast: Autocast | None = None
        self._versions: list[tuple[int, int]] = []
        self._left: list[tuple[int, int]] | None = None

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Within: the model's calls are seen."""
        held, seen = self._model.__dict__, _Seen(self._model, self._called)
        held["_compiled_call_impl"] = seen
        try:
            yield
        finally:
            held["_compiled_call_impl"] = seen.compiled
            if seen.compiled is None:
                del held["_compiled_call_impl"]

    def _called(self) -> None:
        if self._autocast is None:
            self._autocast = Autocast.now(self._device.type)

    def backward_seen(self) -> None:
        """A backward pass came."""
        if self._autocast is not None and not self._autocast.backward and torch.is_autocast_enabled(self._device.type):
            self._autocast = replace(self._autocast, backward=True)

    def begin(self) -> None:
        """A batch begins."""
        self._autocast, self._versions = None, self._version() if self._holders else []

    def end(self) -> Ran:
        """It ended."""
        self._left = self._version() if self._holders else []
        moved = self._left != self._versions
        if not moved and self._autocast is None:
            return _PLAINLY
        return Ran(self._autocast, self._modes.now() if moved else None)

    def moved_since(self) -> bool:
        """Whether buffers were written to after the last batch ended."""
        return self._left is not None and bool(self._holders) and self._version() != self._left

    def _version(self) -> list[tuple[int, int]]:
        """Changes when a buffer is written to, or another tensor takes its place."""
        held = [buffer for part in self._holders for buffer in part._buffers.values() if buffer is not None]
        return [(id(buffer), buffer._version) for buffer in held]
