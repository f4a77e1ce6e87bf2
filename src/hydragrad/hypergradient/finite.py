"""Where a sweep's numbers stop being finite: the first step and tensor, at next to no cost."""

from collections.abc import Sequence
from typing import final

import torch
from torch import Tensor


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
        """After step ``step`` the tensors are these. Their largest numbers tell, in one call for all of them."""
        given = [x if x.numel() else x.new_zeros(1) for x in tensors]
        largest = torch._foreach_norm(given, float("inf"))  # pyright: ignore[reportPrivateImportUsage]
        good = torch.stack([x.double() for x in largest]).isfinite()
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
