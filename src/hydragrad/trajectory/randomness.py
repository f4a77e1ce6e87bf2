"""The random generators that training draws from (torch's, numpy's, Python's): read, set, watched, followed again."""

import contextlib
import ctypes
import hashlib
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from hydragrad.errors import StoreError, UnsupportedError, message

GENERATORS = ("torch", "cuda", "numpy", "python")

_CPU = torch.device("cpu")

Draw = Mapping[str, Tensor | None]
"""What a micro-batch drew from: generator -> its state then; None: where the last draw before it had ended."""


@final
@dataclass(frozen=True)
class RandomState:
    """States of global random generators as uint8 tensors; None: a generator that does not matter here.

    ``torch``: the CPU generator; ``cuda``: that of ``device``; ``numpy``: the global Mersenne twister; ``python``: the
    module ``random``. Example: ``with RandomState.capture(device).restored(): ...`` leaves no trace.
    """

    torch: Tensor | None = None
    cuda: Tensor | None = None
    numpy: Tensor | None = None
    python: Tensor | None = None
    device: "torch.device" = _CPU  # quoted: the field above has the module's name

    @staticmethod
    def capture(device: "torch.device | str" = "cpu", generators: Sequence[str] = GENERATORS, /) -> "RandomState":
        """The states now."""
        device = torch.device(device)
        found = _look(device, generators)
        return RandomState.of({name: _to_tensor(name, value) for name, value in found.items()}, device)

    @staticmethod
    def of(tensors: Mapping[str, Tensor], device: "torch.device | str" = "cpu") -> "RandomState":
        """Inverse of ``tensors``."""
        return RandomState(**tensors, device=torch.device(device))

    def tensors(self) -> dict[str, Tensor]:
        """Generator -> state, for those that matter."""
        every = {name: getattr(self, name) for name in GENERATORS}
        return {name: state for name, state in every.items() if state is not None}

    def set(self) -> None:
        """Put the global generators into this state."""
        for name, state in self.tensors().items():
            try:
                _set(name, state, self.device)
            except (RuntimeError, TypeError, ValueError, struct.error) as error:
                raise StoreError(
                    message(
                        f"a random state of {name} cannot be set",
                        got=str(error).splitlines()[0],
                        cause="an altered file, or a run recorded with another release",
                        remedy="record the run again",
                    )
                ) from error

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Within: the generators in this state. Afterwards: as the caller had them."""
        kept = RandomState.capture(self.device, tuple(self.tensors()))
        self.set()
        try:
            yield
        finally:
            kept.set()


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Afterwards every global generator, on every device in use, is as the caller had it."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    kept = RandomState.capture("cpu", ("numpy", "python"))
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            kept.set()


@contextlib.contextmanager
def seeded(*key: Any) -> Iterator[None]:
    """Within: the CPU generators of torch, numpy and Python seeded from ``key``. Afterwards: as the caller had them."""
    seed = int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
    with RandomState.capture("cpu", ("torch", "numpy", "python")).restored():
        torch.default_generator.manual_seed(seed)
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
        random.seed(seed)
        yield


# -----------------------------------------------------------------------------------------------------------------
# While recording


@final
class RandomWatch:
    """Looks at the generators around every micro-batch, in some twenty microseconds, and says what was drawn from."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._names = tuple(name for name in GENERATORS if name != "cuda" or device.type == "cuda")
        self._before: dict[str, Any] | None = None
        self._numpy: tuple[bytes, int, float] | None = None

    def begin(self) -> None:
        """A micro-batch begins."""
        self._before = self._look()

    def end(self) -> "tuple[dict[str, Any], dict[str, Any]] | None":
        """It ended: states before and after of the generators that were drawn from; None: of none."""
        before, self._before = self._before, None
        if before is None:
            return None
        after = self._look()
        drawn = [name for name in before if before[name] != after[name]]
        return ({n: before[n] for n in drawn}, {n: after[n] for n in drawn}) if drawn else None

    def _look(self) -> dict[str, Any]:
        found = _look(self._device, self._names, self._numpy)
        self._numpy = found["numpy"]
        return found


@final
class DrawWriter:
    """Turns what was drawn into what is stored: a state only where it does not follow from the draw before it."""

    def __init__(self) -> None:
        self._ends: dict[str, Any] = {}

    def draw(self, drawn: "tuple[dict[str, Any], dict[str, Any]] | None") -> Draw | None:
        """The record of a micro-batch, given in the order in which replay will run them."""
        if drawn is None:
            return None
        before, after = drawn
        draw = {
            name: None if self._ends.get(name) == state else _to_tensor(name, state) for name, state in before.items()
        }
        self._ends.update(after)
        return draw

    def forget(self) -> None:
        """A checkpoint: replay may start here, so nothing goes on from before it."""
        self._ends = {}


@final
class DrawReader:
    """Follows recorded draws in a replay. ``ends``: where each generator's last draw ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.ends: dict[str, Tensor] = {}

    @contextlib.contextmanager
    def drawing(self, draw: Draw | None) -> Iterator[RandomState | None]:
        """Within: the generators as they were when this micro-batch was trained on; yields that state."""
        if draw is None:
            yield None
            return
        known = {name: state if state is not None else self.ends[name] for name, state in draw.items()}
        start = RandomState.of(known, self._device)
        with start.restored():
            yield start
            self.ends.update(RandomState.capture(self._device, tuple(known)).tensors())


# -----------------------------------------------------------------------------------------------------------------
# The generators one by one


def _look(device: torch.device, names: Sequence[str], numpy_before: Any = None) -> dict[str, Any]:
    """Plain comparable states, as cheap as they come."""
    found: dict[str, Any] = {}
    for name in names:
        if name == "torch":
            found[name] = torch.get_rng_state().numpy().tobytes()
        elif name == "cuda" and device.type == "cuda":  # seed and offset live on the host: nothing is waited for
            generator = torch.cuda.default_generators[
                torch.cuda.current_device() if device.index is None else device.index
            ]
            found[name] = struct.pack("<QQ", generator.initial_seed(), generator.get_offset())
        elif name == "numpy":
            found[name] = _look_at_numpy(numpy_before)
        elif name == "python":
            found[name] = random.getstate()
    return found


def _look_at_numpy(before: tuple[bytes, int, float] | None = None) -> tuple[bytes, int, float]:
    """The twister's words with its position, and the normal number it keeps for the next call (drawn in pairs).

    Asking numpy takes 30 microseconds. The words can be read in place; where they are as ``before`` and no number was
    kept, nothing else can have changed.
    """
    module: Any = np.random
    generator = module.get_bit_generator()
    words = ctypes.string_at(generator.ctypes.state_address, 625 * 4) if type(generator) is np.random.MT19937 else b""
    if before is not None and words and words == before[0] and not before[1]:
        return before
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


def _to_tensor(name: str, value: Any) -> Tensor:
    if name == "numpy":
        value = value[0] + struct.pack("<id", *value[1:])
    elif name == "python":
        _, words, gauss = value
        value = np.asarray(words, "<u4").tobytes() + struct.pack("<id", gauss is not None, gauss or 0.0)
    return torch.frombuffer(bytearray(value), dtype=torch.uint8)


def _set(name: str, state: Tensor, device: torch.device) -> None:
    if name == "torch":
        torch.set_rng_state(state.clone())  # a row of a file may lie unaligned, which torch does not survive
    elif name == "cuda":
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
    else:
        data = state.numpy().tobytes()
        words = np.frombuffer(data, "<u4", 625)
        kept, gauss = struct.unpack_from("<id", data, 625 * 4)
        if name == "numpy":
            twister = {"key": words[:624].copy(), "pos": int(words[624])}
            np.random.set_state({"bit_generator": "MT19937", "state": twister, "has_gauss": kept, "gauss": gauss})
        else:
            random.setstate((3, tuple(words.tolist()), gauss if kept else None))
