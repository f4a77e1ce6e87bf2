"""A few bytes of each random generator that move with every draw, read in place: whether anything was drawn.

Asking numpy for its state takes 30 microseconds and asking Python ten. All but CUDA's are Mersenne twisters. A draw
moves the position among the words, and whoever draws so often that it stands there again has made new words: the
position and one word beside it tell. What they do not tell is whether a normal number is kept for the next call (they
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
    """The same of Python's generator; None where they do not lie as CPython lays them."""
    owner = getattr(random, "_inst", None)
    size = getattr(random.Random.__base__, "__basicsize__", 0)
    if type(owner) is not random.Random or size < object.__basicsize__ + WORDS:
        return None
    start = id(owner) + object.__basicsize__
    words = ctypes.string_at(start, WORDS)
    return ctypes.c_uint64.from_address(start) if words[4:] + words[:4] == python_state()[0] else None


def python_state() -> tuple[bytes, float | None]:
    """Words and position, and the normal number that is kept for the next call."""
    _, words, gauss = random.getstate()
    return np.asarray(words, "<u4").tobytes(), gauss


_TORCH, _PYTHON = _torch_place(), _python_place()
_KEPT: Any = vars(random._inst) if _PYTHON is not None else {}  # type: ignore[attr-defined]


class _Numpy:
    """Numpy's global generator as last seen, and where its last word and position lie (None: it is no twister)."""

    generator: Any = None
    place: Any = None


def torch_mark() -> int | None:
    """Of torch's CPU generator. None, here and below: it cannot be told so."""
    return None if _TORCH is None else _TORCH.value


def numpy_mark() -> int | None:
    """Of numpy's global generator."""
    module: Any = np.random
    generator = module.get_bit_generator()
    if generator is not _Numpy.generator:
        _Numpy.generator, _Numpy.place = generator, None
        if type(generator) is np.random.MT19937:
            _Numpy.place = ctypes.c_uint64.from_address(generator.ctypes.state_address + WORDS - 8)
    return None if _Numpy.place is None else _Numpy.place.value


def python_mark() -> tuple[int, float | None] | None:
    """Of Python's, its kept normal number with it."""
    return None if _PYTHON is None else (_PYTHON.value, _KEPT["gauss_next"])
