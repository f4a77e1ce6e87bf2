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
    parts = [summary.rstrip(". ") + "."]
    if expected is not None:
        parts.append(f"Expected: {expected}.")
    if got is not None:
        parts.append(f"Got: {got}.")
    if cause:
        parts.append(f"Likely cause: {cause.rstrip('. ')}.")
    if remedy:
        parts.append(f"Remedy: {remedy.rstrip('. ')}.")
    return " ".join(parts)
