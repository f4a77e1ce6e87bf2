"""A few bytes of each random generator that move with every draw, read in place: whether anything was drawn.

Asking numpy for its state takes 30 microseconds and asking Python ten. All but CUDA's are Mersenne twisters. A draw
moves the position among the words, and whoever draws so often that it stands there again has made new words: the
position and words beside it tell. What they do not tell is whether a normal number is kept for the next call (they
are made in pairs): see ``generators``.
"""

import ctypes
import random
import struct
from typing import Any

import numpy as np
import torch

WORDS = 625 * 4
"""Of a twister with its position, in bytes."""
TORCH_SIZE, TORCH_KEPT = 5056, slice(5040, 5056)
"""Bytes of the state that torch gives of a CPU generator, and where in it kept normal numbers would be."""


def _torch_place() -> Any:
    """Position and first word of torch's generator in memory; None where they do not lie as torch lays them."""
    generator = torch.default_generator
    start, state = getattr(generator, "_cdata", None), generator.get_state().numpy().tobytes()
    if not isinstance(start, int) or len(state) != TORCH_SIZE:
        return None
    _, left, seeded, position = struct.unpack_from("<QiiQ", state)
    words = np.frombuffer(state, "<u8", 624, 24).astype("<u4").tobytes()
    expected = struct.pack("<iII", left, seeded, position) + words
    place = ctypes.string_at(start, len(expected) + 128).find(expected) + 8
    return ctypes.c_uint64.from_address(start + place) if place >= 8 and not (start + place) % 8 else None


def _python_place() -> Any:
    """The position and three words of Python's generator; None where they do not lie as CPython lays them."""
    owner = getattr(random, "_inst", None)
    size = getattr(random.Random.__base__, "__basicsize__", 0)
    if type(owner) is not random.Random or size < object.__basicsize__ + WORDS:
        return None
    start = id(owner) + object.__basicsize__
    words = ctypes.string_at(start, WORDS)
    if words[4:] + words[:4] != python_state()[0]:
        return None
    return (ctypes.c_uint64 * 2).from_address(start)  # the first word is the same after every seed


def python_state() -> tuple[bytes, float | None]:
    """Words and position, and the normal number that is kept for the next call."""
    _, words, gauss = random.getstate()
    return np.asarray(words, "<u4").tobytes(), gauss


def _view(place: Any) -> Any:
    """The numbers at a place, as items: a view is read in a third of the time that ctypes takes."""
    return _NOWHERE if place is None else memoryview(place).cast("B").cast("Q")


_NOWHERE = (None, None)
_TORCH, _PYTHON = _view(_torch_place()), _view(_python_place())
_KEPT: Any = vars(random._inst) if _PYTHON is not _NOWHERE else {"gauss_next": None}  # type: ignore[attr-defined]


class _Asked:
    """Where numpy does not show its global generator as an attribute: it is asked."""

    @property
    def _bit_generator(self) -> Any:
        module: Any = np.random
        return module.get_bit_generator()


_RANDOM: Any = getattr(getattr(np.random, "mtrand", None), "_rand", None)
if not hasattr(_RANDOM, "_bit_generator"):
    _RANDOM = _Asked()


class _Numpy:
    """Numpy's global generator as last seen, and the number that tells of its last word and position."""

    generator: Any = None
    view: Any = _NOWHERE


def _follow_numpy() -> None:
    """It is another generator than it was; no view where it is no twister."""
    _Numpy.generator, _Numpy.view = _RANDOM._bit_generator, _NOWHERE
    if type(_Numpy.generator) is np.random.MT19937:
        _Numpy.view = _view(ctypes.c_uint64.from_address(_Numpy.generator.ctypes.state_address + WORDS - 8))


def read() -> tuple[Any, ...]:
    """The numbers of all: equal where nothing was drawn and no normal number is kept."""
    if _RANDOM._bit_generator is not _Numpy.generator:
        _follow_numpy()
    return _TORCH[0], _Numpy.view[0], _PYTHON[0], _PYTHON[1], _KEPT["gauss_next"]


def told(numbers: tuple[Any, ...]) -> dict[str, Any]:
    """What ``read`` gave, by generator; None: it cannot be told so."""
    torchs, numpys, *pythons = numbers
    return {"torch": torchs, "numpy": numpys, "python": None if pythons[0] is None else pythons}
