"""The user's part of a run: model, per-example loss, data, and how a batch's losses became one scalar."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from hydragrad.errors import MismatchError, UnsupportedError, message

Loss = Callable[[nn.Module, Any], Tensor]
"""Per-example losses of a batch, shape ``[b]`` or ``[b, L]``."""

Coefficients = Callable[[Any, torch.Size], Tensor]
"""From a batch and the shape of its losses to coefficients that broadcast to that shape."""


Penalty = Callable[[nn.Module], Tensor]
"""A number that depends on the model alone, added to the objective once a step."""


@final
class Reduction:
    """How the losses of one batch became the scalar that was differentiated: sum_i c_i loss_i.

    ``"mean"``: c_i = 1 / (number of losses); ``"sum"``: c_i = 1; a callable ``(batch, shape) -> c`` gives its own.
    Coefficients never depend on the losses, nor on the weights of the examples: a removed example leaves the
    denominator as it was.

    Example: ``Reduction("mean").scalar(batch, losses, None)`` is ``losses.mean()``.
    """

    def __init__(self, rule: "str | Coefficients | Reduction" = "mean") -> None:
        if isinstance(rule, Reduction):
            rule = rule.rule
        if not callable(rule) and rule not in ("mean", "sum"):
            raise UnsupportedError(
                message(
                    "unknown reduction",
                    expected="'mean', 'sum', or a callable (batch, shape) -> coefficients",
                    got=repr(rule),
                    remedy="name what the training loop does with the per-example losses of a batch",
                )
            )
        self.rule: str | Coefficients = rule

    @property
    def name(self) -> str | None:
        """``"mean"`` or ``"sum"``; None for a callable."""
        return self.rule if isinstance(self.rule, str) else None

    def __repr__(self) -> str:
        return f"Reduction({self.rule!r})"

    def coefficients(self, batch: Any, losses: Tensor) -> Tensor:
        """c, with the shape of ``losses``; no gradient flows through it."""
        if self.rule == "mean":
            return torch.full_like(losses, 1.0 / losses.numel(), requires_grad=False)
        if self.rule == "sum":
            return torch.ones_like(losses, requires_grad=False)
        assert callable(self.rule)
        given = self.rule(batch, losses.shape)
        try:
            given = torch.as_tensor(given).detach().to(device=losses.device, dtype=losses.dtype)
            return given.expand(losses.shape)
        except (RuntimeError, TypeError, ValueError) as error:
            raise MismatchError(
                message(
                    "the reduction's coefficients do not fit the losses",
                    expected=f"a tensor that broadcasts to {tuple(losses.shape)}",
                    got=f"shape {tuple(given.shape)}" if isinstance(given, Tensor) else repr(given),
                    remedy="return one coefficient per loss (or a scalar) from reduction(batch, shape)",
                )
            ) from error

    def scalar(self, batch: Any, losses: Tensor, weights: Tensor | None) -> Tensor:
        """sum_i c_i w_i loss_i; ``weights`` [b] multiply the losses (over all L), the denominator never changes."""
        if weights is not None:
            weights = weights.to(device=losses.device, dtype=losses.dtype)
            losses = losses * weights.reshape(weights.shape + (1,) * (losses.dim() - 1))
        if self.rule == "mean":
            return losses.mean()
        if self.rule == "sum":
            return losses.sum()
        return (losses * self.coefficients(batch, losses)).sum()


@final
@dataclass(frozen=True)
class Problem:
    """Everything that is code or data of the user's: given once, used by replay and sweeps alike."""

    model: nn.Module
    loss: Loss
    data: Any
    reduction: Reduction
    collate: Callable[[list[Any]], Any]
    penalty: Penalty | None = None

    def penalty_of(self, model: nn.Module) -> Tensor:
        """The penalty, added to the objective of a step's first micro-batch; weights of examples do not scale it."""
        assert self.penalty is not None
        value = self.penalty(model)
        if not isinstance(value, Tensor) or value.dim() != 0:
            raise MismatchError(
                message(
                    "the penalty is not a number",
                    expected="penalty(model) -> a tensor of shape []",
                    got=f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__,
                    remedy="sum over the parameters: sum(p.square().sum() for p in model.parameters())",
                )
            )
        return value

    def losses(self, model: nn.Module, batch: Any, examples: int) -> Tensor:
        """The per-example losses of a batch, refused unless of shape ``[b]`` or ``[b, L]`` with b = ``examples``."""
        return self.checked(self.loss(model, batch), examples)

    @staticmethod
    def checked(losses: Tensor, examples: int) -> Tensor:
        """``losses``, refused unless of shape ``[b]`` or ``[b, L]``."""
        if not isinstance(losses, Tensor) or losses.dim() not in (1, 2) or losses.shape[0] != examples:
            raise MismatchError(
                message(
                    "the loss is not per example",
                    expected=f"a tensor of shape [{examples}] or [{examples}, L]",
                    got=f"shape {list(losses.shape)}" if isinstance(losses, Tensor) else type(losses).__name__,
                    cause="the loss was already averaged over the batch",
                    remedy="return losses with reduction='none' and give reduction='mean' or 'sum' to hydragrad.load",
                )
            )
        return losses
