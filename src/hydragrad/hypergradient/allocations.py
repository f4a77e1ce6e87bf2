"""Counting what tensor operations allocate, the same number on every run; and what the process takes meanwhile."""

import weakref
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from hydragrad.hypergradient.pages import give_back, resident


@final
class Allocations(TorchDispatchMode):
    """Counts the bytes of storages that operations inside the context make: ``live`` now, ``peak`` at most.

    Kernels that call no operation (compiled graphs) allocate unseen, and so do the workspaces inside a kernel.
    ``risen``: how far resident memory rose above what it was, free memory given back first (0 where it cannot be read).
    Example: ``with Allocations() as counted: torch.ones(10) + 1`` leaves ``counted.peak >= 80``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = self.risen = 0
        self._known: set[int] = set()
        give_back()
        self._before = resident()

    def __torch_dispatch__(self, func: Any, types: Sequence[Any], args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {_storage(x)._cdata for x in pytree.tree_leaves((args, kwargs)) if _plain(x)}
        for x in pytree.tree_leaves(out):
            if _plain(x):
                storage = _storage(x)
                if storage._cdata not in before and storage._cdata not in self._known:
                    self._count(storage)
        self.risen = max(self.risen, resident() - self._before)
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size).atexit = False

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def _storage(x: Tensor) -> torch.UntypedStorage:
    return x.untyped_storage()


def _plain(x: Any) -> bool:
    return isinstance(x, Tensor) and x.layout == torch.strided and type(x) in (Tensor, torch.nn.Parameter)
