"""The picture is really drawn: its size, its images, its colours."""

from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

import hydragrad as hg
from hydragrad.report.pictures import HARMED, HELPED, WRONG, Tile, draw_evidence


def pixels_of(path: Path) -> np.ndarray:
    """RGB bytes [h, w, 3]."""
    return (matplotlib.image.imread(path)[..., :3] * 255).round().astype(np.int64)


def count(pixels: np.ndarray, colour: str) -> int:
    """Pixels of just this colour."""
    wanted = np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])
    return int((pixels == wanted).all(-1).sum())


def draw(path: Path, *, true: str | None = None, image: torch.Tensor | None = None, title: str = "Why?") -> np.ndarray:
    image = torch.eye(8) if image is None else image
    tiles = [Tile(image, "3", 0.25), Tile(image, "7", 0.125, true)]
    return pixels_of(draw_evidence(path, image, ["a 3", "test image 5"], tiles, tiles, title=title, dpi=100))


def test_the_picture_has_its_size_and_its_images(tmp_path: Path) -> None:
    pixels = draw(tmp_path / "new" / "why.png")
    assert pixels.shape == (472, 552, 3)
    # The diagonal of an 8 x 8 image is an eighth of it: five images, the query's much the largest.
    black, white = count(pixels, "#000000"), count(pixels, "#ffffff")
    assert black > 5000
    assert white > 5 * black
    assert count(pixels, HELPED) > 100
    assert count(pixels, HARMED) > 100
    # The training images begin 3.0 inches from the left: four of 106 pixels a side, an eighth of each black.
    assert count(pixels[:, 300:], "#000000") > 4 * 106**2 / 8 * 0.9


def test_wrong_labels_are_red_and_only_they(tmp_path: Path) -> None:
    assert count(draw(tmp_path / "right.png"), WRONG) == 0
    red = draw(tmp_path / "wrong.png", true="1")
    assert count(red, WRONG) > 200
    assert max(count(row[None], WRONG) for row in red) > 95, "a frame's edge, 106 pixels long, not only words"


def test_colour_images_keep_their_colours(tmp_path: Path) -> None:
    image = torch.zeros(4, 4, 3)
    image[..., 0] = 1.0
    assert count(draw(tmp_path / "red.png", image=image), "#ff0000") > 5000


def test_the_same_picture_has_the_same_bytes(tmp_path: Path) -> None:
    draw(tmp_path / "a.png")
    draw(tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


def test_missing_matplotlib_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(hg.UnsupportedError, match=r"pip install 'hydragrad\[plot\]'"):
        draw(tmp_path / "why.png")
