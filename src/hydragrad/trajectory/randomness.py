"""The random generators that training draws from (torch's, numpy's, Python's): read, set, watched, followed again."""

import contextlib
import hashlib
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from hydragrad.errors import StoreError, message
from hydragrad.trajectory.generators import GENERATORS, Look, Looker, changed, put, to_tensor

_CPU = torch.device("cpu")
_ON_CPU = ("torch", "numpy", "python")

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
        chosen = [name for name in generators if name != "cuda" or device.type == "cuda"]
        found = Looker(device, chosen).look().states
        return RandomState.of({name: to_tensor(name, value) for name, value in found.items()}, device)

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
                put(name, state, self.device)
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
    kept = RandomState.capture("cpu", _ON_CPU)  # torch's too: looks learn of what they set by themselves alone
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        kept.set()


@contextlib.contextmanager
def seeded(*key: Any) -> Iterator[None]:
    """Within: the CPU generators of torch, numpy and Python seeded from ``key``. Afterwards: as the caller had them."""
    with RandomState.capture("cpu", _ON_CPU).restored():
        _seed(_ON_CPU, number_of(*key))
        yield


def number_of(*key: Any) -> int:
    """A seed from plain values."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


def _seed(names: Sequence[str], seed: int) -> None:
    if "torch" in names:
        torch.default_generator.manual_seed(seed)
    if "numpy" in names:
        np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    if "python" in names:
        random.seed(seed)


@final
class Seeding:
    """Calls with the CPU generators ``seeded`` each by a number of its own, many of them at a tenth of the cost.

    numpy and Python are seeded only if calls are seen to draw from them: those among which the first is are made again.
    Example: ``samples = seeding.each(dataset.__getitem__, ids, numbers)``.
    """

    def __init__(self) -> None:
        self._seeded: tuple[str, ...] = ("torch",)
        self._looker, self._others = Looker(_CPU, _ON_CPU), Looker(_CPU, _ON_CPU[1:])

    def __reduce__(self) -> Any:
        return Seeding, ()  # a worker process has generators of its own

    def each(self, function: Callable[[Any], Any], items: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
        """``[function(item) for item in items]``; afterwards the generators are as the caller had them."""
        before = self._looker.look()
        drawn = None
        try:
            made = self._each(function, items, numbers)
            drawn = self._drawn(before)
            if drawn and self._seeded is not _ON_CPU:
                self._seeded, drawn = _ON_CPU, None
                made = self._each(function, items, numbers)
            return made
        finally:
            for name in ("torch", *(self._drawn(before) if drawn is None else drawn)):
                put(name, to_tensor(name, before.states[name]), _CPU)

    def _drawn(self, before: Look) -> list[str]:
        """Those of numpy and Python that were drawn from."""
        return [name for name, state in self._others.look().states.items() if state != before.states[name]]

    def _each(self, function: Callable[[Any], Any], items: Sequence[Any], numbers: Sequence[int]) -> list[Any]:
        made, many = list[Any](), self._seeded is _ON_CPU
        for item, number in zip(items, numbers, strict=True):
            torch.default_generator.manual_seed(number)
            if many:
                _seed(_ON_CPU[1:], number)
            made.append(function(item))
        return made


# -----------------------------------------------------------------------------------------------------------------
# While recording


Drawn = tuple[Mapping[str, Any], Mapping[str, Any]]
"""States before and after (nothing: unknown) of the generators that a micro-batch drew from."""

_IDLE = 100
"""After so many micro-batches that drew nothing it is only looked whether one does, not where it ended."""


@final
class RandomWatch:
    """Looks at the generators around every micro-batch and says what was drawn from."""

    def __init__(self, device: torch.device) -> None:
        self._looker = Looker(device, [name for name in GENERATORS if name != "cuda" or device.type == "cuda"])
        self._open = False
        self._last: Look | None = None
        self._complete: Look | None = None
        self._idle = 0

    def begin(self) -> None:
        """A micro-batch begins."""
        self._last, self._complete, self._open = self._looker.look(self._last), None, True

    def complete(self) -> None:
        """Its backward pass came: what is drawn from here on is the loop's own, and not for a replay."""
        if self._open and self._idle < _IDLE:
            self._complete = self._looker.look(self._last)

    def end(self) -> Drawn | None:
        """It ended; None: nothing was drawn."""
        if not self._open:
            return None
        before, self._open = self._last, False
        assert before is not None
        self._last = after = self._complete or self._looker.look(before)
        drawn = changed(before, after)
        if not drawn:
            self._idle += 1
            return None
        known, self._idle = self._idle < _IDLE, 0
        first, second = ({name: at.states[name] for name in drawn} for at in (before, after))
        return first, second if known else {}


@final
class DrawWriter:
    """Turns what was drawn into what is stored: a state only where it does not follow from the draw before it."""

    def __init__(self) -> None:
        self._ends: dict[str, Any] = {}

    def draw(self, drawn: Drawn | None) -> Draw | None:
        """The record of a micro-batch, given in the order in which replay will run them."""
        if drawn is None:
            return None
        before, after = drawn
        draw = {
            name: None if self._ends.get(name) == state else to_tensor(name, state) for name, state in before.items()
        }
        self._ends.update({name: after.get(name) for name in before})
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
