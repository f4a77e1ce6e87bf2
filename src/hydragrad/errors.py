"""The one family of errors, and the shape of their messages."""

from typing import final


class HydragradError(Exception):
    """Root of everything the library refuses to do."""


@final
class StoreError(HydragradError):
    """A recorded run on disk is missing, broken, altered, locked, or of another format version."""


@final
class MismatchError(HydragradError):
    """What was given (model, data, loss, reduction, weights) is not what was recorded or asked for."""


@final
class UnsupportedError(HydragradError):
    """The library does not (yet) do this, and says so instead of guessing."""


@final
class NonFiniteError(HydragradError):
    """A NaN or an infinity where a finite number is needed."""


def message(summary: str, *, expected: object = None, got: object = None, cause: str = "", remedy: str = "") -> str:
    """Format a refusal: what went wrong, what was expected, what was got, the likely cause, the remedy.

    Example: ``message("wrong length", expected=3, got=4, remedy="give the data set of the recorded run")``.
    """
    given = {"Expected: ": expected, "Got: ": got, "Likely cause: ": cause or None, "Remedy: ": remedy or None}
    return " ".join([_sentence(summary), *(_sentence(f"{name}{x}") for name, x in given.items() if x is not None)])


def _sentence(words: str) -> str:
    words = words.rstrip()
    return words if words.endswith(("?", "!", ".")) else words + "."
