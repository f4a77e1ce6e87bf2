"""Pictures of an answer: one query and the training images that made it so."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

from torch import Tensor

from hydragrad.errors import UnsupportedError, message
from hydragrad.files import write_atomically

HELPED, HARMED, WRONG = "#0b7a75", "#b4531a", "#c1121f"
INK, QUIET, FAINT = "#22272c", "#5c6670", "#c9ced3"
HEIGHT, LEFT, CELL, TILE = 4.72, 3.0, 1.2, 1.06
"""Inches: the page, the part of the query, a training image with its margin and without."""


@final
@dataclass(frozen=True)
class Tile:
    """One training image of a picture: the image, its given label, its score; ``true`` if the label is wrong."""

    image: Tensor
    label: str
    score: float
    true: str | None = None


def draw_evidence(
    path: str | Path,
    query: Tensor,
    caption: Sequence[str],
    helpful: Sequence[Tile],
    harmful: Sequence[Tile],
    *,
    title: str = "",
    dpi: int = 130,
) -> Path:
    """Write a PNG: the query image with its caption, and a row each of helpful and of harmful training images.

    Images are [h, w] or [h, w, 3]. Wrong labels are drawn in red, with the true one. Raises UnsupportedError without
    matplotlib. Example: ``draw_evidence("why.png", image, ["label 3", "predicted 5"], helpful, harmful)``.
    """
    width = LEFT + CELL * max(len(helpful), len(harmful), 1) + 0.12
    figure, save = figure_on_file(width, HEIGHT)
    page = _Page(figure, width)
    page.words(0.2, 0.3, title, fontsize=14, weight="bold", color=INK)
    _draw_query(page, query, caption)
    for top, tiles, words, colour in (
        (0.72, helpful, "Helped most: without it, the loss on the left image would rise", HELPED),
        (2.64, harmful, "Harmed most: without it, the loss on the left image would fall", HARMED),
    ):
        page.words(LEFT, top, words, fontsize=11, weight="bold", color=colour)
        for column, tile in enumerate(tiles):
            _draw_tile(page.square(LEFT + column * CELL, top + 0.45, TILE), tile, colour)
    if any(tile.true is not None for tile in (*helpful, *harmful)):
        page.words(LEFT, HEIGHT - 0.2, "red: trained with a wrong label", fontsize=9.5, color=WRONG)
    return save(path, dpi)


def figure_on_file(width: float, height: float) -> tuple[Any, Callable[[str | Path, int], Path]]:
    """An empty figure of this size in inches, and what writes it: no screen and no global state."""
    figure_class, canvas_class = _matplotlib()
    figure = figure_class(figsize=(width, height), facecolor="white")
    canvas_class(figure)

    def save(path: str | Path, dpi: int) -> Path:
        drawn = io.BytesIO()
        figure.savefig(drawn, dpi=dpi, format="png", metadata={"Software": None})  # the same picture, the same bytes
        write_atomically(Path(path), drawn.getvalue())
        return Path(path)

    return figure, save


@final
class _Page:
    """A figure addressed in inches from its upper left corner."""

    def __init__(self, figure: Any, width: float) -> None:
        self.figure, self.width = figure, width

    def words(self, x: float, y: float, text: str, **style: Any) -> None:
        self.figure.text(x / self.width, 1 - y / HEIGHT, text, va="center", **style)

    def square(self, x: float, y: float, size: float) -> Any:
        return self.figure.add_axes((x / self.width, 1 - (y + size) / HEIGHT, size / self.width, size / HEIGHT))


def _matplotlib() -> tuple[Any, Any]:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            message("pictures need matplotlib, which is not installed", remedy="pip install 'hydragrad[plot]'")
        ) from error
    return Figure, FigureCanvasAgg


def _draw_query(page: _Page, image: Tensor, caption: Sequence[str]) -> None:
    size = LEFT - 0.65
    axes = page.square(0.2, 1.17, size)
    _show(axes, image)
    _frame(axes, INK, 1.5)
    for line, words in enumerate(caption):
        style = {"fontsize": 12, "weight": "bold", "color": INK} if line == 0 else {"fontsize": 10.5, "color": QUIET}
        page.words(0.2 + size / 2, 1.17 + size + 0.25 + 0.26 * line, words, ha="center", **style)


def _draw_tile(axes: Any, tile: Tile, colour: str) -> None:
    _show(axes, tile.image)
    if tile.true is None:
        _frame(axes, FAINT, 1.0)
        axes.set_title(f"label {tile.label}", fontsize=9.5, color=INK, pad=4)
    else:
        _frame(axes, WRONG, 2.4)
        axes.set_title(f"label {tile.label}, is {tile.true}", fontsize=9.5, color=WRONG, weight="bold", pad=4)
    axes.set_xlabel(f"{tile.score:+.3f}".replace("-", "−"), fontsize=9.5, color=colour, labelpad=4)


def _show(axes: Any, image: Tensor) -> None:
    axes.imshow(image.numpy(), cmap="gray_r", interpolation="nearest", aspect="equal")
    axes.set_xticks([])
    axes.set_yticks([])


def _frame(axes: Any, colour: str, width: float) -> None:
    for spine in axes.spines.values():
        spine.set_color(colour)
        spine.set_linewidth(width)
