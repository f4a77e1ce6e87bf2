"""Amounts of memory and disk as people write them: bytes, or "2 GB"."""

import re
from typing import Any

from hydragrad.errors import UnsupportedError, message

Amount = int | str
"""Bytes, or a number with its unit: ``"2 GB"`` (1000^3 bytes), ``"512 MiB"`` (1024^2 bytes)."""

_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4}
_AMOUNT = re.compile(r"\s*(?P<number>[0-9]+(\.[0-9]+)?)\s*(?P<power>[KMGT]?)(?P<binary>I?)B\s*", re.IGNORECASE)


def bytes_of(amount: Any, name: str) -> int:
    """``amount`` in bytes; ``name`` is the argument it was given as. Raises UnsupportedError.

    Example: ``bytes_of("2 GB", "memory") == 2 * 10**9``.
    """
    found = _AMOUNT.fullmatch(amount) if isinstance(amount, str) else None
    if found is not None:
        base = 1024 if found["binary"] else 1000
        size = int(float(found["number"]) * base ** _POWERS[found["power"].upper()])
        binary_of_nothing = found["binary"] and not found["power"]
    else:
        size, binary_of_nothing = amount, False
    if not isinstance(size, int) or isinstance(size, bool) or binary_of_nothing:
        raise UnsupportedError(
            message(
                f"{name} is no amount of bytes",
                expected='an int (bytes), or a string such as "2 GB" or "512 MiB"',
                got=repr(amount),
            )
        )
    if size < 1:
        raise UnsupportedError(message(f"{name} is too small", expected="at least 1 byte", got=amount))
    return size


def in_words(size: int) -> str:
    """Bytes as one reads them, e.g. ``"1.5 GB"``."""
    for unit, power in (("GB", 3), ("MB", 2), ("kB", 1)):
        if size >= 1000**power:
            return f"{size / 1000**power:.3g} {unit}"
    return f"{size} bytes"
