"""What a recorded run is made of: states, steps, and the description of the run."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hydragrad.errors import UnsupportedError, message
from hydragrad.step.clipping import Clip
from hydragrad.trajectory.randomness import Draw, RandomState
from hydragrad.trajectory.watching import Autocast

Hyper = dict[str, Any]
"""Hyperparameters of one param group at one step: floats, bools, ints, strings, None, tuples of these; and which of
them were tensors (``hyper.TENSORS``)."""


@final
@dataclass(frozen=True)
class State:
    """Everything training changes, before step ``step`` is taken (``step`` = T: the end of the run).

    ``params`` and ``buffers`` by name (ties once, frozen parameters too); ``optimizer``: parameter name -> slot ->
    tensor, as in torch.optim's own state (a slot that is None there is absent here); ``random``: in a checkpoint the
    generators as training had them, in a replay where the last recorded draws ended.
    """

    step: int
    params: dict[str, Tensor]
    buffers: dict[str, Tensor]
    optimizer: dict[str, dict[str, Tensor]]
    random: RandomState | None = None


@final
@dataclass(frozen=True)
class Pass:
    """A skipped batch whose forward pass changed buffers (BatchNorm's statistics), though no gradient came from it.

    ``place``: how many of its step's micro-batches came before it.
    """

    ids: Tensor
    digests: Tensor | None
    epoch: int
    place: int
    modes: Mapping[str, bool]
    autocast: Autocast | None = None
    draw: Draw | None = None


@final
@dataclass(frozen=True)
class StepRecord:
    """What happened in one optimizer step, without the values: those come from replay.

    ``batches``: ids of each micro-batch in order, int64 ``[b]``; ``digests``: per-example content digests, parallel,
    None where they were not noted; ``groups``: hyperparameters of each param group; ``fingerprint``: float64 [3], the
    gradient's norm and two projections just before the update (of the optimizer's parameters), None where it was not
    noted; ``modes``: submodule name -> training; ``skipped``: ids of batches before this step that no gradient came
    from; ``draws``: what each micro-batch drew random numbers from, None for nothing; ``clips``: how the gradient was
    clipped, in order, before the fingerprint was taken; ``scale``: of a gradient scaler; ``autocast`` of each
    micro-batch's forward pass; ``frozen``: parameters that held a gradient while they did not require one: a constant
    (zeros) to whoever differentiates the step; ``passes``: skipped batches that changed buffers.
    """

    index: int
    epoch: int
    batches: tuple[Tensor, ...]
    digests: tuple[Tensor | None, ...]
    groups: tuple[Hyper, ...]
    without_grad: frozenset[str]
    fingerprint: Tensor | None
    modes: Mapping[str, bool] = field(default_factory=dict)
    epochs: tuple[int, ...] = ()
    loaders: tuple[int, ...] = ()
    skipped: tuple[Tensor, ...] = ()
    draws: tuple[Draw | None, ...] = ()
    clips: tuple[Clip, ...] = ()
    scale: float | None = None
    autocast: tuple[Autocast | None, ...] = ()
    frozen: frozenset[str] = frozenset()
    passes: tuple[Pass, ...] = ()

    @property
    def random(self) -> bool:
        """Whether random numbers were drawn inside the step."""
        return any(draw is not None for draw in self.draws) or any(p.draw is not None for p in self.passes)


@final
@dataclass(frozen=True)
class Manifest:
    """The description of a recorded run, written once when its first step is taken."""

    version: int
    torch: str
    params: dict[str, dict[str, Any]]
    """Parameter name -> {"shape", "dtype", "requires_grad"; "stride" unless contiguous}, in the model's order."""
    buffers: dict[str, dict[str, Any]]
    optimizer: dict[str, Any]
    """{"class", "module", "groups": names of each group's parameters in order}."""
    modes: dict[str, bool]
    data_length: int | None
    collate: dict[str, Any]
    """{"mode": how batches were fetched, "function": its name, "default": whether it is torch's default}."""
    batch: list[dict[str, Any]]
    """The leaves of the first batch: {"path", "dtype", "shape"}."""
    reduction: str | None
    checkpoint_every: int
    device: str
    extra: dict[str, Any] = field(default_factory=dict)
    """{"compiled": whether a compiled model trained}."""


UNREAD = torch.empty(0, device="meta")
"""In place of an optimizer's tensor that nobody reads: whoever does gets an error from torch."""


def live_buffers(module: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    """The buffers of these names as they are now: a forward pass may have put other tensors in their places."""
    now = dict(module.named_buffers())
    return {name: now[name] for name in names if name in now}


@torch.no_grad()
def capture_state(
    step: int,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimizer: Optimizer,
    random: RandomState | None = None,
    *,
    slots: bool = True,
) -> State:
    """The State of live tensors as detached clones; raises UnsupportedError for optimizer state that is no tensor.

    ``slots`` False: of the optimizer's tensors only which are there (``UNREAD``), and the value of counters.
    """
    kept = {}
    for name, param in params.items():
        held = optimizer.state.get(param)
        if held:
            kept[name] = {
                slot: UNREAD
                if not slots and isinstance(value, Tensor) and value.dim()
                else _tensor(name, slot, value).clone()
                for slot, value in held.items()
                if value is not None
            }
    return State(
        step,
        {name: param.clone() for name, param in params.items()},
        {name: buffer.clone() for name, buffer in buffers.items()},
        kept,
        random,
    )


def check_slots(params: Mapping[str, Tensor], optimizer: Optimizer) -> None:
    """Refuse an optimizer whose state cannot be stored: said at the first step, not at a checkpoint."""
    for name, param in params.items():
        for slot, value in optimizer.state.get(param, {}).items():
            if value is not None:
                _tensor(name, slot, value)


def _tensor(name: str, slot: str, value: Any) -> Tensor:
    if isinstance(value, Tensor) and value.layout == torch.strided:
        return value
    sparse = isinstance(value, Tensor)
    raise UnsupportedError(
        message(
            f"the optimizer keeps {slot!r} of parameter {name!r} as "
            + ("a sparse tensor" if sparse else type(value).__name__),
            expected="dense tensors, as torch.optim's optimizers keep of dense gradients",
            cause="an embedding with sparse=True" if sparse else "",
            remedy="make the embedding with sparse=False, or train it without momentum"
            if sparse
            else "keep a counter as torch.tensor(0.0)",
        )
    )
