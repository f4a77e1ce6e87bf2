"""The random generators one by one (torch's, numpy's, Python's): looked at cheaply, as bytes, and set."""

import ctypes
import random
import struct
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydragrad.errors import UnsupportedError, message

GENERATORS = ("torch", "cuda", "numpy", "python")

_WORDS = 625 * 4  # of a Mersenne twister with its position, in bytes

Looks = dict[str, Any]
"""Generator -> its state in a form that is cheap to read: see ``changed`` and ``plain``."""


def look(device: torch.device, names: Sequence[str], before: Looks | None = None) -> Looks:
    """The states now; ``before``: an earlier look, whose states are taken over where nothing was drawn since."""
    found: Looks = {}
    for name in names:
        if name == "torch":
            found[name] = torch.default_generator.get_state()
        elif name == "cuda" and device.type == "cuda":  # seed and offset live on the host: nothing is waited for
            generator = torch.cuda.default_generators[
                torch.cuda.current_device() if device.index is None else device.index
            ]
            found[name] = struct.pack("<QQ", generator.initial_seed(), generator.get_offset())
        elif name == "numpy":
            found[name] = _numpy_now(None if before is None else before[name])
        elif name == "python":
            found[name] = _python_now(None if before is None else before[name])
    return found


def changed(before: Looks, after: Looks) -> list[str]:
    """The generators that were drawn from between two looks."""
    return [name for name, was in before.items() if not _same(was, after[name])]


def _same(a: Any, b: Any) -> bool:
    return a is b or (torch.equal(a, b) if isinstance(a, Tensor) else plain(a) == plain(b))


def plain(looked: Any) -> Any:
    """A look's state in a form that compares by ``==``."""
    if isinstance(looked, Tensor):
        return looked.numpy().tobytes()
    return looked[:-1] if isinstance(looked, tuple) else looked  # without its mark


# -----------------------------------------------------------------------------------------------------------------
# Twisters in memory. Asking numpy takes 30 microseconds and asking Python ten. A draw moves the position among the
# words, and whoever draws so often that it stands there again has made new words: reading the position and one word
# beside it, in place, tells whether anything was drawn.


class _Numpy:
    """Numpy's global generator as last seen, and where its last word and position lie (None: it is no twister)."""

    generator: Any = None
    mark: Any = None


def _numpy_now(before: tuple[bytes, int, float, int] | None) -> tuple[bytes, int, float, int]:
    """The words with their position, the normal number that is kept for the next call (drawn in pairs), the mark."""
    module: Any = np.random
    generator = module.get_bit_generator()
    if generator is not _Numpy.generator:
        _Numpy.generator, _Numpy.mark = generator, None
        if type(generator) is np.random.MT19937:
            _Numpy.mark = ctypes.c_uint64.from_address(generator.ctypes.state_address + _WORDS - 8)
    mark = -1 if _Numpy.mark is None else _Numpy.mark.value
    if before is not None and before[3] == mark >= 0 and not before[1]:  # no number is kept that could have gone
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
    return words, int(state["has_gauss"]), float(state["gauss"]), mark


def _python_mark() -> Any:
    """Position and first word of Python's generator in memory; None where they do not lie as CPython lays them."""
    owner = getattr(random, "_inst", None)
    size = getattr(random.Random.__base__, "__basicsize__", 0)
    if type(owner) is not random.Random or size < object.__basicsize__ + _WORDS:
        return None
    start = id(owner) + object.__basicsize__
    words = ctypes.string_at(start, _WORDS)
    return ctypes.c_uint64.from_address(start) if words[4:] + words[:4] == _python_asked()[0] else None


def _python_asked() -> tuple[bytes, float | None]:
    _, words, gauss = random.getstate()
    return np.asarray(words, "<u4").tobytes(), gauss


_PYTHON = _python_mark()
_KEPT: Any = vars(random._inst) if _PYTHON is not None else {}  # type: ignore[attr-defined]


def _python_now(before: tuple[bytes, float | None, int] | None) -> tuple[bytes, float | None, int]:
    """The words with their position, the normal number that is kept for the next call, the mark."""
    mark = -1 if _PYTHON is None else _PYTHON.value
    if before is not None and before[2] == mark >= 0 and before[1] == _KEPT["gauss_next"]:
        return before
    return *_python_asked(), mark


# -----------------------------------------------------------------------------------------------------------------
# As tensors


def to_tensor(name: str, looked: Any) -> Tensor:
    """A look's state as uint8, the same on every machine."""
    if isinstance(looked, Tensor):
        return looked
    if name == "numpy":
        looked = looked[0] + struct.pack("<id", *looked[1:3])
    elif name == "python":
        words, gauss = looked[:2]
        looked = words + struct.pack("<id", gauss is not None, gauss or 0.0)
    return torch.frombuffer(bytearray(looked), dtype=torch.uint8)


def put(name: str, state: Tensor, device: torch.device) -> None:
    """Set a generator to a state that ``to_tensor`` gave."""
    if name == "torch":
        torch.set_rng_state(state.clone())  # a row of a file may lie unaligned, which torch does not survive
    elif name == "cuda":
        if device.type == "cuda":
            torch.cuda.set_rng_state(state, device)
    else:
        data = state.numpy().tobytes()
        words = np.frombuffer(data, "<u4", 625)
        kept, gauss = struct.unpack_from("<id", data, _WORDS)
        if name == "numpy":
            twister = {"key": words[:624].copy(), "pos": int(words[624])}
            np.random.set_state({"bit_generator": "MT19937", "state": twister, "has_gauss": kept, "gauss": gauss})
        else:
            random.setstate((3, tuple(words.tolist()), gauss if kept else None))
