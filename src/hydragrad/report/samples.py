"""How one example looks on a page: an image, a text, or its numbers."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from hydragrad.errors import HydragradError, MismatchError, message
from hydragrad.report.png import data_uri, is_image, pixels_of

Show = Callable[[Any], Tensor | str]
"""From a sample to an image [h, w], [1, h, w] or [3, h, w], or to a text: how a reader should see it."""

TEXT, NUMBERS = 600, 12
"""Characters of a text and numbers of a table that are shown."""


class Look(NamedTuple):
    """What of an example is shown: the address of an image, a text, or rows of (name, number)."""

    image: str = ""
    text: str = ""
    numbers: tuple[tuple[str, str], ...] = ()


def look_of(data: Any, place: int, show: Show | None, most: int) -> Look:
    """The look of ``data[place]``; images have at most ``most`` pixels a side.

    ``show``, else what the input is: an image [1 | 3, h, w], a string, or whatever numbers it has. Raises
    MismatchError where ``show`` fails, or returns neither an image nor a text.
    """
    sample = data[place]
    if show is not None:
        return _shown(sample, place, show, most)
    given = _input(sample)
    if isinstance(given, str):
        return Look(text=shortened(given))
    if isinstance(given, Tensor) and is_image(given):
        return Look(image=data_uri(pixels_of(given, most)))
    return Look(numbers=_numbers(given))


def _input(sample: Any) -> Any:
    """The first part of a sample of several, as in (image, label): what the model was given."""
    return sample[0] if isinstance(sample, tuple | list) and len(sample) > 1 else sample


def _shown(sample: Any, place: int, show: Show, most: int) -> Look:
    expected = "show(sample) -> an image [h, w], [1, h, w] or [3, h, w], or a text"
    try:
        found = show(sample)
        if isinstance(found, str):
            return Look(text=shortened(found))
        if isinstance(found, Tensor):
            return Look(image=data_uri(pixels_of(found, most)))
    except HydragradError as error:
        raise MismatchError(message(f"example {place} cannot be shown", expected=expected, got=str(error))) from error
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise MismatchError(message(f"example {place} cannot be shown", expected=expected, got=got)) from error
    raise MismatchError(message(f"example {place} cannot be shown", expected=expected, got=type(found).__name__))


def shortened(text: str) -> str:
    """The beginning of a long text."""
    return text if len(text) <= TEXT else text[:TEXT].rstrip() + " …"


def _numbers(given: Any) -> tuple[tuple[str, str], ...]:
    """The first numbers of a tensor or of a structure of them, with their places."""
    rows: list[tuple[str, str]] = []
    _collect(given, "", rows)
    rest = len(rows) - NUMBERS
    return tuple(rows[:NUMBERS]) if rest <= 0 else (*rows[: NUMBERS - 1], ("…", f"{rest + 1} more"))


def _collect(given: Any, name: str, rows: list[tuple[str, str]]) -> None:
    if isinstance(given, dict):
        for key, part in given.items():
            _collect(part, f"{name}.{key}" if name else str(key), rows)
    elif isinstance(given, tuple | list):
        for place, part in enumerate(given):
            _collect(part, f"{name}[{place}]", rows)
    elif isinstance(given, Tensor) and given.dim():
        rows += [
            (f"{name}[{place}]", number(value)) for place, value in enumerate(given.detach().flatten().cpu().tolist())
        ]
    elif isinstance(given, int | float | Tensor):
        rows.append((name or "value", number(given.item() if isinstance(given, Tensor) else given)))
    else:
        rows.append((name or "value", shortened(str(given))))


def number(value: float | complex | bool) -> str:
    """Three digits that matter; integers whole."""
    if isinstance(value, bool | int | complex):
        return str(value)
    return (f"{value:#.3g}".rstrip(".") if value else "0").replace("-", "−")


def signed(value: float) -> str:
    """As ``number``, with its sign."""
    return ("+" if value >= 0 else "") + number(float(value))


def image_side(images: int) -> int:
    """Pixels a side for this many images: a page stays light, and small images (28 x 28) stay as they are."""
    return int(min(96, max(32, (500_000 / max(images, 1)) ** 0.5)))
