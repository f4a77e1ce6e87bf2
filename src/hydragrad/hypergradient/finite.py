"""Where a sweep's numbers stop being finite: the first step and tensor, at next to no cost."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor

_LARGE = 2**16
"""Numbers from which on a CPU one call a tensor costs less: the joint one takes twelve times as long a number."""


@final
class FirstBad:
    """Looks at blocks of vectors, one a parameter of ``names``, after every step of a sweep.

    One pass over them a step; the answer stays on their device until it is asked for. Example:
    ``bad = FirstBad(["w"]); bad.see(7, [torch.tensor([float("nan")])]); bad.first()`` is ``(7, ["w"])``.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = list(names)
        self._steps: list[int] = []
        self._at: Tensor | None = None  # the place in `_steps` of each parameter's first bad step

    def see(self, step: int, tensors: Sequence[Tensor]) -> None:
        """After step ``step`` the tensors are these. Their largest numbers tell."""
        given = [x if x.numel() else x.new_zeros(1) for x in tensors]
        good = torch.stack([x.double() for x in _largest(given)]).isfinite()
        if self._at is None:
            self._at = torch.full((len(good),), -1, device=good.device)
        self._at = torch.where(good | (self._at >= 0), self._at, len(self._steps))
        self._steps.append(step)

    def first(self) -> tuple[int, list[str]] | None:
        """The first step after which some were not finite, and their names. Waits for the device."""
        places = [] if self._at is None else self._at.tolist()
        bad = [place for place in places if place >= 0]
        if not bad:
            return None
        names = [name for name, place in zip(self._names, places, strict=False) if place == min(bad)]
        return self._steps[min(bad)], names


def _largest(tensors: list[Tensor]) -> Sequence[Tensor]:
    """A number of each tensor that is finite if and only if all of its own are."""
    if tensors[0].device.type == "cpu" and sum(x.numel() for x in tensors) > _LARGE:
        return [torch.maximum(high.abs(), low.abs()) for low, high in map(torch.aminmax, tensors)]
    return torch._foreach_norm(tensors, float("inf"))  # pyright: ignore[reportPrivateImportUsage]
