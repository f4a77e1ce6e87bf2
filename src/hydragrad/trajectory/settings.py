"""The arguments of ``record``, checked."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from hydragrad.errors import UnsupportedError, message
from hydragrad.files import save_tensors
from hydragrad.trajectory.optimizers import check_known
from hydragrad.trajectory.thinning import Thinning


@final
@dataclass(frozen=True)
class Settings:
    """How a run is recorded; refused where that makes no sense."""

    path: Path
    reduction: str | None
    checkpoint_every: int
    thinning: Thinning
    overwrite: bool
    resume: bool
    scaler: GradScaler | None
    keep_batches: bool
    states: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.reduction not in (None, "mean", "sum"):
            raise UnsupportedError(
                message(
                    "unknown reduction",
                    expected="'mean', 'sum' or None",
                    got=repr(self.reduction),
                    remedy="code is not recorded: give a callable reduction to hydragrad.load instead",
                )
            )
        if not isinstance(self.checkpoint_every, int) or self.checkpoint_every < 1:
            raise UnsupportedError(
                message("bad checkpoint_every", expected="a positive int", got=repr(self.checkpoint_every))
            )
        if self.resume and self.overwrite:
            raise UnsupportedError(
                message(
                    "resume and overwrite contradict each other",
                    remedy="resume=True goes on with the run in the folder, overwrite=True replaces it",
                )
            )
        odd = [name for name, one in self.states.items() if not _has_state(one)]
        if odd:
            raise UnsupportedError(
                message(
                    f"states: {odd[0]!r} cannot be put back",
                    expected="objects with state_dict and load_state_dict",
                    got=type(self.states[odd[0]]).__name__,
                )
            )

    @property
    def used_scaler(self) -> GradScaler | None:
        """The gradient scaler, if it does anything."""
        return self.scaler if self.scaler is not None and self.scaler.is_enabled() else None

    def check_optimizer(self, optimizer: Optimizer) -> None:
        """Refuse what a recorder cannot see, or a replay not repeat."""
        check_known(optimizer)
        if self.used_scaler is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
            raise UnsupportedError(
                message(
                    "a fused optimizer skips a scaler's overflowing steps inside its kernel",
                    expected="an optimizer whose step() is not called on overflow",
                    got=f"{type(optimizer).__name__}(fused=True)",
                    cause="the gradients are unscaled, and the step perhaps skipped, where no recorder can see it",
                    remedy="make the optimizer with fused=False",
                )
            )


def _has_state(one: Any) -> bool:
    return callable(getattr(one, "state_dict", None)) and callable(getattr(one, "load_state_dict", None))


def check_model(model: Any) -> None:
    """Refuse what is no module, and one whose tensors cannot be stored."""
    if not isinstance(model, nn.Module):
        raise UnsupportedError(no_module(model))
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        try:
            save_tensors({"": torch.empty(0, dtype=tensor.dtype)}, {})
        except KeyError as error:
            raise UnsupportedError(
                message(
                    f"{name!r} is {tensor.dtype}, which cannot be stored",
                    expected="float32 or float64 parameters",
                    got=str(tensor.dtype),
                    remedy="keep the real and the imaginary part: nn.Parameter(torch.view_as_real(x)), and "
                    "torch.view_as_complex in the forward pass"
                    if tensor.is_complex()
                    else "keep it in another dtype",
                )
            ) from error


def no_module(model: Any) -> str:
    """A refusal's message for a model that is none."""
    return message(
        "the model is no torch.nn.Module",
        expected="the module whose parameters are trained",
        got=getattr(model, "__qualname__", type(model).__name__),
        cause="a function that makes the model, or its class" if callable(model) else "",
        remedy="give the module itself: model=build(), not model=build" if callable(model) else "",
    )


def refuse_closure(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuse a step that evaluates the loss by itself."""
    if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
        raise UnsupportedError(
            message(
                "optimizer.step was given a closure",
                expected="one gradient per step",
                cause=f"{type(optimizer).__name__} evaluates the loss inside the step",
                remedy="use an optimizer whose step() takes no closure",
            )
        )
