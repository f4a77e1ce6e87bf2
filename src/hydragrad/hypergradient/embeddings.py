"""Embeddings whose training step is no step along a gradient: found by running the loss once, whoever calls them."""

from collections.abc import Callable
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hydragrad.errors import UnsupportedError, message
from hydragrad.step.objective import Objective, Point

_NAMES: dict[Any, tuple[str, ...]] = {
    F.embedding: ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse"),
    F.embedding_bag: ("input", "weight", "offsets", "max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse"),
}
"""The functions: names of their positional arguments."""


def check_embeddings(objective: Objective, point: Point) -> None:
    """Refuse a loss at ``point`` whose embeddings, of weights that train, scale gradients or rewrite their rows."""
    with objective.differentiable(), torch.enable_grad(), _Looking():
        params = tuple(p.detach().requires_grad_() for p in point.params)
        objective.losses(params, point.rest, point.batch, point.carried, point.draws)


@final
class _Looking(TorchFunctionMode):
    """While it lasts, such calls are refused before they are made."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _NAMES:
            given = {**dict(zip(_NAMES[func], args, strict=False)), **(kwargs or {})}
            weight = given.get("weight")
            if isinstance(weight, Tensor) and weight.requires_grad:
                _refuse(given)
        return func(*args, **(kwargs or {}))


def _refuse(given: dict[str, Any]) -> None:
    if given.get("scale_grad_by_freq"):
        raise UnsupportedError(
            message(
                "an embedding that trains divides its gradient by the frequency of each token in the batch",
                expected="steps along the gradient of the losses",
                got="scale_grad_by_freq=True",
                cause="what it gives is the gradient of no loss, and torch's derivatives of it leave the scale out",
                remedy="train with scale_grad_by_freq=False",
            )
        )
    if given.get("max_norm") is not None:
        raise UnsupportedError(
            message(
                "an embedding that trains shortens its rows in every forward pass",
                expected="parameters that the optimizer alone changes",
                got=f"max_norm={given['max_norm']}",
                cause="it rewrites its weight in place, outside of autograd: no derivative passes through that",
                remedy="train without max_norm, or shorten what comes out of the embedding, inside the model",
            )
        )
