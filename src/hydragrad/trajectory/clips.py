"""Clipping calls of a recorded loop: torch's functions called, and noted for the step."""

from collections.abc import Iterable, Mapping
from typing import final

import torch
from torch import Tensor, nn

from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.step.clipping import Clip


@final
class ClipNotes:
    """What was clipped since the last step."""

    def __init__(self, params: Mapping[str, Tensor]) -> None:
        self._names = {id(param): name for name, param in params.items()}
        self._noted: list[Clip] = []
        self._last: tuple[Clip, ...] = ()

    def norm_(
        self,
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float,
        error_if_nonfinite: bool,
        foreach: bool | None,
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_``."""
        chosen, names = self._named(parameters)
        norm = nn.utils.clip_grad_norm_(chosen, max_norm, norm_type, error_if_nonfinite, foreach)
        self._noted.append(Clip("norm", names, float(max_norm), float(norm_type), foreach))
        return norm

    def value_(self, parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None) -> None:
        """``torch.nn.utils.clip_grad_value_``."""
        chosen, names = self._named(parameters)
        nn.utils.clip_grad_value_(chosen, clip_value, foreach)
        self._noted.append(Clip("value", names, float(clip_value), foreach=foreach))

    def backward(self, fresh: bool) -> None:
        """A backward pass came: into fresh gradients (what was clipped is gone), or on top of clipped ones."""
        if self._noted and not fresh:
            raise UnsupportedError(
                message(
                    "a backward pass added to gradients that were clipped already",
                    expected="clipping once a step's gradient is complete, right before optimizer.step()",
                    cause="clipping after every micro-batch of an accumulated step",
                    remedy="clip after the last micro-batch only",
                )
            )
        self._noted = []

    def take(self) -> tuple[Clip, ...]:
        """The clips of the step that is being taken."""
        taken, self._noted = tuple(self._noted), []
        if taken != self._last:
            self._last = taken
        return self._last

    def _named(self, parameters: Tensor | Iterable[Tensor]) -> tuple[list[Tensor], tuple[str, ...]]:
        chosen = [parameters] if isinstance(parameters, torch.Tensor) else list(parameters)
        names = tuple(self._names.get(id(param), "") for param in chosen)
        if "" in names or len(set(names)) != len(names):
            raise MismatchError(
                message(
                    "what is clipped are not the model's parameters, each once",
                    expected="parameters of the model given to hydragrad.record",
                    got=f"{names.count('')} unknown tensors, {len(names) - len(set(names))} repeated",
                    remedy="recording.clip_grad_norm_(model.parameters(), max_norm)",
                )
            )
        return chosen, names
