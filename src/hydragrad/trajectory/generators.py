"""The random generators one by one (torch's, numpy's, Python's): looked at cheaply, as bytes, and set."""

import ctypes
import random
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from hydragrad.errors import UnsupportedError, message
from hydragrad.trajectory.marks import TORCH_KEPT, WORDS, python_state, read, told

GENERATORS = ("torch", "cuda", "numpy", "python")


@final
@dataclass(frozen=True)
class Look:
    """Generators at one moment: their states, comparable by ``==``.

    ``read``: the numbers that their marks come from, which move with every draw; ``sure``: all of them tell.
    """

    states: Mapping[str, Any]
    read: tuple[Any, ...]
    sure: bool


_LAST: dict[str, tuple[Any, Any]] = {}
"""Of each generator the mark (None: it does not tell) and the state when it was read last, by whichever Looker."""


@final
class Looker:
    """Looks at these generators."""

    def __init__(self, device: torch.device, names: Sequence[str]) -> None:
        self.names, self._device = tuple(names), device
        self._cuda = "cuda" in self.names

    def look(self, before: Look | None = None) -> Look:
        """The generators now; ``before``: an earlier look, itself given back if nothing was drawn since."""
        numbers, cuda = read(), _cuda_now(self._device) if self._cuda else None
        if before is not None and before.sure and (numbers, cuda) == before.read:
            return before
        marks = told(numbers) | {"cuda": cuda}
        now, sure = {}, True
        for name in self.names:
            mark, now[name] = _LAST.get(name, (None, None))
            if mark is None or mark != marks[name]:
                now[name] = _STATES[name](self._device)
                mark = None if _keeps_a_normal(name, now[name]) else marks[name]
                _LAST[name] = mark, now[name]
            sure = sure and mark is not None
        return Look(now, (numbers, cuda), sure)


def changed(before: Look, after: Look) -> list[str]:
    """The generators that were drawn from between two looks."""
    if before is after:
        return []
    return [name for name, was in before.states.items() if was != after.states[name]]


def _keeps_a_normal(name: str, state: Any) -> bool:
    """Whether the next normal number was made already (they are, in pairs) and may go without a mark's moving."""
    return (name == "torch" and any(state[TORCH_KEPT])) or (name == "numpy" and bool(state[1]))


def _torch_now() -> bytes:
    state = torch.default_generator.get_state()
    return ctypes.string_at(state.data_ptr(), state.numel())  # by way of numpy it takes three times as long


def _cuda_now(device: torch.device) -> bytes:
    """Seed and offset live on the host: nothing is waited for."""
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    return struct.pack("<QQ", generator.initial_seed(), generator.get_offset())


def _numpy_now() -> tuple[bytes, int, float]:
    """The words with their position, and the normal number that is kept for the next call."""
    state: Any = np.random.get_state(legacy=False)
    if state["bit_generator"] != "MT19937":
        raise UnsupportedError(
            message(
                "numpy's global generator was replaced",
                expected="MT19937",
                got=state["bit_generator"],
                remedy="leave np.random's global generator as it is; generators of your own are not affected",
            )
        )
    words = np.asarray(state["state"]["key"], "<u4").tobytes() + struct.pack("<i", state["state"]["pos"])
    return words, int(state["has_gauss"]), float(state["gauss"])


_STATES: dict[str, Callable[[torch.device], Any]] = {
    "torch": lambda _: _torch_now(),
    "cuda": _cuda_now,
    "numpy": lambda _: _numpy_now(),
    "python": lambda _: python_state(),
}


# -----------------------------------------------------------------------------------------------------------------
# As tensors


def to_tensor(name: str, looked: Any) -> Tensor:
    """A look's state as uint8, the same on every machine."""
    if name == "numpy":
        looked = looked[0] + struct.pack("<id", *looked[1:])
    elif name == "python":
        words, gauss = looked
        looked = words + struct.pack("<id", gauss is not None, gauss or 0.0)
    return torch.frombuffer(bytearray(looked), dtype=torch.uint8)


def put(name: str, state: Tensor, device: torch.device) -> None:
    """Set a generator to a state that ``to_tensor`` gave."""
    _LAST.pop(name, None)  # one that keeps a normal number has the mark of one that does not
    if name == "torch":
        torch.set_rng_state(state.clone())  # a row of a file may lie unaligned, which torch does not survive
    elif name == "cuda":
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
    else:
        data = state.numpy().tobytes()
        words = np.frombuffer(data, "<u4", 625)
        kept, gauss = struct.unpack_from("<id", data, WORDS)
        if name == "numpy":
            twister = {"key": words[:624].copy(), "pos": int(words[624])}
            np.random.set_state({"bit_generator": "MT19937", "state": twister, "has_gauss": kept, "gauss": gauss})
        else:
            random.setstate((3, tuple(words.tolist()), gauss if kept else None))
