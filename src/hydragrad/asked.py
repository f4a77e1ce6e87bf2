"""What scores answer, in a form that can be compared: nothing is proved or shown by another question than they had."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor

from hydragrad.errors import MismatchError, message
from hydragrad.resuming import digest, qualified
from hydragrad.shapes import Float

_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}
_HALF = 0.05
"""How far the same measurement may differ, relative to itself and to the mean of all, by dtype of the scores."""


@final
@dataclass(frozen=True)
class Asked:
    """The question that scores answer.

    ``measured`` float64 [M]: the value of every column at ``step`` of the recorded run; ``groups``: tells the groups of
    training examples whose scores were summed (empty: rows are examples); ``measurement``: its name (empty: the loss).
    """

    measured: Float[Tensor, " M"]
    step: int
    groups: str = ""
    measurement: str = ""

    @staticmethod
    def of(measured: Tensor, step: int, groups: Any = None, measurement: Callable[..., Any] | None = None) -> "Asked":
        """The question of one call, from the measured columns and its arguments."""
        told = "" if groups is None else digest(torch.as_tensor(groups).to("cpu", torch.int64))
        return Asked(measured.detach().to("cpu", torch.float64), step, told, qualified(measurement) or "")

    def averaged(self) -> "Asked":
        """The same of the mean over all queries."""
        return replace(self, measured=self.measured.mean(0, keepdim=True))

    def check(self, other: "Asked", dtype: torch.dtype) -> None:
        """Raises MismatchError if ``other`` asks something else; ``dtype``: of the scores."""
        for name, given in (("step", self.step), ("groups", self.groups)):
            if given != getattr(other, name):
                raise MismatchError(
                    message(
                        f"the scores answer another question: {name} differs",
                        expected=f"{name}={_word(name, given)}, as the scores were made",
                        got=f"{name}={_word(name, getattr(other, name))}",
                        remedy=f"give {name}= as it was given to attribute, or attribute again",
                    )
                )
        if not bool(other.measured.isfinite().all()):
            return  # nothing to compare: the question has no answer, which is said elsewhere
        a, b = self.measured, other.measured
        near = _ROUNDING.get(dtype, _HALF) * (a.abs() + a.abs().mean())
        far = ((a - b).abs() > near).nonzero().flatten()
        if len(far):
            named = tuple(x.measurement or "the loss" for x in (self, other))
            cause = "other queries, or these in another order, aggregated otherwise, or another measurement="
            if named[0] != named[1]:
                cause = f"the scores are for {named[0]}, and {named[1]} is asked about"
            first = int(far[0])
            raise MismatchError(
                message(
                    f"the scores answer another question: {len(far)} of {len(a)} columns measure otherwise",
                    expected=f"{float(a[first]):.6g} for column {first}, as when it was attributed",
                    got=f"{float(b[first]):.6g}",
                    cause=cause,
                    remedy="give queries, measurement=, aggregate= and step= as they were given to attribute",
                )
            )


def _word(name: str, given: Any) -> str:
    if name == "step":
        return str(given)
    return "None" if not given else f"groups with the hash {given[:8]}"
