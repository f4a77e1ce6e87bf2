"""Where a sweep's numbers stop being finite: the first step and tensor, at next to no cost."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

_GATHERED = 64
"""Looks after which what they saw is put together: each is a number a tensor, kept where the tensor is."""
_LARGE = 2**16
"""Numbers from which on a CPU one call a tensor costs less: the joint one takes twelve times as long a number."""


@final
class FirstBad:
    """Looks at blocks of vectors, one a parameter of ``names``, after every step of a sweep.

    One pass over them a step; what it found is gathered when it is asked for, or is much. Example:
    ``bad = FirstBad(["w"]); bad.see(7, [torch.tensor([float("nan")])]); bad.first()`` is ``(7, ["w"])``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._seen: list[tuple[int, Sequence[Tensor | float]]] = []
        self._found: tuple[int, list[str]] | None = None

    def see(self, step: int, parts: Sequence[Tensor | float]) -> None:
        """After step ``step`` the tensors (or numbers) are these. Their largest numbers tell."""
        if self._found is None:
            tensors = [x if x.numel() else x.new_zeros(1) for x in parts if isinstance(x, Tensor)]
            self._seen.append((step, _largest(tensors) if tensors else parts))
            if len(self._seen) == _GATHERED:
                self.first()

    def first(self) -> tuple[int, list[str]] | None:
        """The first step after which some were not finite, and their names. Waits for the device."""
        if self._seen and self._found is None:
            largest = [x for _, some in self._seen for x in some]
            good = torch.stack([torch.as_tensor(x, dtype=torch.float64) for x in largest]).isfinite()
            for (step, _), row in zip(self._seen, good.view(len(self._seen), -1).tolist(), strict=True):
                if not all(row):
                    names = [name for name, fine in zip(self._names, row, strict=False) if not fine]
                    self._found = step, names
                    break
            self._seen.clear()
        return self._found


def _largest(tensors: list[Tensor]) -> Sequence[Tensor]:
    """A number of each tensor that is finite if and only if all of its own are."""
    if tensors[0].device.type == "cpu" and sum(x.numel() for x in tensors) > _LARGE:
        return [torch.maximum(high.abs(), low.abs()) for low, high in map(torch.aminmax, tensors)]
    return torch._foreach_norm(tensors, float("inf"))  # pyright: ignore[reportPrivateImportUsage]
