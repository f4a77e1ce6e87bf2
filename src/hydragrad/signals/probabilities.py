"""The model's probabilities from the losses that its examples have with every label.

With cross entropy the loss of example i with label c is w_c (-log p_ic), w the weights of the classes (1: none). The
probabilities of an example add up to one, so that

    f_i(u) = log sum_c exp(-u_c loss_ic) = 0        at u_c = 1 / w_c

for every example: more equations than classes. u is found by least squares (Levenberg and Marquardt, in log u), and
believed if the equations hold: then p_ic = exp(-u_c loss_ic). Where they do not (another loss, label smoothing, labels
that the model knows and the data lacks) p is the softmax of minus the losses, and that is said.
"""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hydragrad.shapes import Float

_HOLDS = {torch.float64: 1e-4, torch.float32: 1e-4}
_HALF = 0.05
"""How far from 0 f may be, by dtype of the losses, and beside the rounding of the largest loss."""
_STEPS = 100
_RATIO = 1e3
"""The largest weight of a class, in times of the smallest."""
NOTE = (
    "the losses are not those of cross entropy over the labels tried (another loss, label smoothing, or labels "
    "missing): probabilities are the softmax of minus the losses, which need not be the model's"
)


@final
@dataclass(frozen=True)
class Scale:
    """``weights`` [C]: of the classes in the loss; None: all one. ``fits``: whether the losses are cross entropy's."""

    weights: tuple[float, ...] | None = None
    fits: bool = True

    @staticmethod
    def of(losses: Float[Tensor, "N C"]) -> "Scale":
        """As the losses of some examples with every label show it."""
        if (plain := Scale()).holds(losses):
            return plain
        found = _least_squares(losses.double()) if len(losses) >= 2 * losses.shape[1] else None
        if found is None or not _plausible(losses.double(), found):
            return Scale(None, False)
        weighted = Scale(tuple((-found).exp().tolist()))
        return weighted if weighted.holds(losses) else Scale(None, False)

    def holds(self, losses: Float[Tensor, "N C"]) -> bool:
        """Whether the probabilities of these losses add up to one."""
        rounding = 8 * torch.finfo(losses.dtype).eps * losses.abs().max(1).values.double()
        f = torch.logsumexp(-self.unweighted(losses.double()), 1)
        return bool((f.abs() <= _HOLDS.get(losses.dtype, _HALF) + rounding).all())

    def unweighted(self, losses: Float[Tensor, "N C"]) -> Float[Tensor, "N C"]:
        """The losses without the weights of the classes: -log p."""
        return losses if self.weights is None else losses / torch.tensor(self.weights, dtype=losses.dtype)

    @property
    def note(self) -> str:
        """What there is to say of it."""
        if not self.fits:
            return NOTE
        if self.weights is None:
            return ""
        least, most = min(self.weights), max(self.weights)
        return f"the loss weighs the classes ({least:.3g} to {most:.3g} times): that is taken out of the probabilities"


PLAIN = Scale()
"""Cross entropy without weights of classes."""


def _equations(losses: Tensor, log_u: Tensor) -> tuple[Tensor, Tensor]:
    """The equations' f [N], and its derivatives in log u [N, C]."""
    scaled = losses * log_u.exp()
    return torch.logsumexp(-scaled, 1), -scaled * torch.softmax(-scaled, 1)


def _plausible(losses: Tensor, log_u: Tensor) -> bool:
    """Not the solution that any losses have: one label certain for every example, at a vanishing u."""
    certain = (-losses * log_u.exp()).exp().min(0).values.max()
    return float(log_u.max() - log_u.min()) <= math.log(_RATIO) and float(certain) <= 0.9


def _least_squares(losses: Tensor) -> Tensor | None:
    """The log u [C] of the smallest sum of squares; None for losses that are not finite or not positive."""
    if not bool(losses.isfinite().all()) or bool((losses < 0).any()):
        return None
    typical = losses.mean(0).clamp(min=1e-300)
    log_u, damping = (math.log(losses.shape[1]) / typical).log(), 1e-3  # exact where every label is as likely
    f, slopes = _equations(losses, log_u)
    for _ in range(_STEPS):
        square = slopes.T @ slopes
        ridge = damping * square.diagonal().clamp(min=1e-12 * float(square.diagonal().max()) + 1e-300)
        step = torch.linalg.solve(square + ridge.diag(), -(slopes.T @ f)).clamp(-1, 1)
        tried, tried_slopes = _equations(losses, log_u + step)
        if float(tried.square().sum()) <= float(f.square().sum()):
            log_u, f, slopes, damping = log_u + step, tried, tried_slopes, max(damping / 5, 1e-12)
            if float(step.abs().max()) < 1e-9:
                break
        elif damping > 1e9:
            break
        else:
            damping *= 5
    return log_u
