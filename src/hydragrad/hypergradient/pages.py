"""Keeping freed memory while a sweep lasts: fresh pages cost more than the arithmetic done on them."""

import contextlib
import ctypes
import mmap
import platform
from collections.abc import Iterator

_MMAP_THRESHOLD, _TRIM_THRESHOLD, _TOP_PAD = -3, -1, -2  # the parameters' numbers in glibc's malloc.h
_ADAPTIVE = 32 * 2**20  # where glibc's own adaptive threshold ends up in a process that frees large blocks


@contextlib.contextmanager
def kept_pages() -> Iterator[None]:
    """Tell glibc's malloc not to give memory back between the blocks of a sweep; nothing on other platforms.

    An engine allocates and frees some hundred megabytes per step. By default glibc returns them to the system, which
    must zero every page again: a fifth to a third of a sweep's time on a CPU. Afterwards the thresholds are set to the
    values that glibc's own adaptation reaches at most, and what is free is given back.
    """
    if platform.libc_ver()[0] != "glibc":
        yield
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_MMAP_THRESHOLD, _ADAPTIVE)
    libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    libc.mallopt(_TOP_PAD, 64 * 2**20)
    try:
        yield
    finally:
        libc.mallopt(_TOP_PAD, 128 * 2**10)
        libc.mallopt(_TRIM_THRESHOLD, 2 * _ADAPTIVE)
        give_back()


def give_back() -> None:
    """Let the system have what glibc's malloc holds free; nothing on other platforms."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def resident() -> int:
    """Bytes of this process that are in memory; 0 where that cannot be read."""
    try:
        with open("/proc/self/statm", "rb") as file:
            return int(file.read().split()[1]) * mmap.PAGESIZE
    except (OSError, ValueError, IndexError):
        return 0
