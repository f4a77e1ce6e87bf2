"""How samples look on a page, and that its colours can be read."""

import base64
import io
import re
from typing import Any, NamedTuple

import matplotlib.image
import pytest
import torch
from torch import Tensor

import hydragrad as hg
from hydragrad.report import page
from hydragrad.report.png import is_image, pixels_of, png
from hydragrad.report.samples import NUMBERS, TEXT, image_side, look_of, number


def decoded(data: bytes) -> Tensor:
    """Bytes [h, w] or [h, w, 3], by another library."""
    values = torch.tensor(matplotlib.image.imread(io.BytesIO(data), format="png"))
    return (values * 255).round().to(torch.uint8)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3), (1, 1), (40, 3)])
def test_a_png_is_read_back_to_the_byte(shape: tuple[int, ...]) -> None:
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(decoded(png(pixels)), pixels)


def test_numbers_become_grey_levels() -> None:
    ramp = torch.arange(16.0).reshape(4, 4)
    bytes_of = lambda image: pixels_of(image, 96).flatten().tolist()  # noqa: E731
    assert bytes_of(ramp / 15) == [17 * k for k in range(16)], "within [0, 1]: as they are"
    assert bytes_of(ramp / 30) == [round(8.5 * k) for k in range(16)], "also where they do not fill it"
    assert bytes_of(ramp - 5) == [17 * k for k in range(16)], "normalised: from the least to the largest"
    assert bytes_of((ramp * 10).to(torch.uint8)) == [10 * k for k in range(16)], "bytes: as they are"
    odd = ramp.clone() / 15
    odd[0, 0], odd[3, 3] = torch.nan, torch.inf
    assert bytes_of(odd)[0] == bytes_of(odd)[-1] == 0
    colour = torch.zeros(3, 4, 5)
    colour[1] = 1.0
    assert pixels_of(colour, 96).tolist() == [[[0, 255, 0]] * 5] * 4
    assert pixels_of(torch.zeros(4, 4), 96).unique().tolist() == [0]


def test_large_images_shrink_and_small_ones_stay() -> None:
    image = torch.zeros(1, 64, 32)
    image[:, :32] = 1
    small = pixels_of(image, 8)
    assert small.tolist() == [[255] * 4] * 4 + [[0] * 4] * 4
    assert pixels_of(image, 64).shape == (64, 32)
    assert image_side(100) > image_side(1000) >= 28


class Pair(NamedTuple):
    words: str
    label: int


def test_inputs_are_drawn_printed_or_tabled() -> None:
    data: list[Any] = [
        (torch.rand(3, 8, 8), 1),
        torch.rand(1, 8, 8),
        Pair("a <b> text", 2),
        "bare",
        (torch.tensor([1.5, -2.0]), 0),
        {"age": 7, "name": "x", "more": torch.tensor([0.25])},
        (torch.zeros(2, 8, 8), 0),
        (torch.arange(30), 1),
        ("y" * 1000, 1),
        7,
    ]
    look = lambda place: look_of(data, place, None, 96)  # noqa: E731
    assert decoded(base64.b64decode(look(0).image.partition(",")[2])).shape == (8, 8, 3)
    assert decoded(base64.b64decode(look(1).image.partition(",")[2])).shape == (8, 8)
    assert look(2).text == "a <b> text"
    assert look(3).text == "bare"
    assert look(4).numbers == (("[0]", "1.50"), ("[1]", "−2.00"))
    assert look(5).numbers == (("age", "7"), ("name", "x"), ("more[0]", "0.250"))
    assert len(look(6).numbers) == len(look(7).numbers) == NUMBERS
    assert look(7).numbers[-1] == ("…", f"{30 - NUMBERS + 1} more")
    assert look(8).text == "y" * TEXT + " …"
    assert look(9).numbers == (("value", "7"),)
    assert not is_image(torch.zeros(2, 8, 8))
    assert not is_image(torch.zeros(1, 1, 900))


def test_show_decides() -> None:
    data = [(torch.tensor([3, 1]), 0)]
    words = {1: "world", 3: "hello"}
    shown = look_of(data, 0, lambda sample: " ".join(words[int(i)] for i in sample[0]), 96)
    assert shown.text == "hello world"
    assert look_of(data, 0, lambda sample: torch.ones(8, 8), 96).image.startswith("data:image/png;base64,")


def test_numbers_in_words() -> None:
    assert [number(x) for x in (0.0, 0.012, -0.3, 12.0, 1234.5, 1e-7, 5, True)] == [
        "0", "0.0120", "−0.300", "12.0", "1.23e+03", "1.00e−07", "5", "True"
    ]  # fmt: skip


def test_a_page_without_jinja2_is_refused_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "jinja2", None)
    with pytest.raises(hg.UnsupportedError, match=r"pip install 'hydragrad\[report\]'"):
        page.render(None)  # type: ignore[arg-type]


def luminance(colour: str) -> float:
    parts = [int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
def test_every_colour_of_words_stands_out(scheme: int) -> None:
    """WCAG's contrast of 4.5 for text, on the page and on its cards; on the darkest cell of a matrix, 3 at least."""
    style = (page._TEMPLATES / "style.css").read_text()
    block = re.findall(r":root \{(.*?)\}", style, re.S)[scheme]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6});", block))
    contrast = lambda a, b: (max(a, b) + 0.05) / (min(a, b) + 0.05)  # noqa: E731
    for words in ("ink", "quiet", "helped", "harmed", "wrong", "accent"):
        for ground in ("paper", "card"):
            assert contrast(luminance(colours[words]), luminance(colours[ground])) >= 4.5, (words, ground)
    mixed = [(int(colours["accent"][k : k + 2], 16) + int(colours["card"][k : k + 2], 16)) // 2 for k in (1, 3, 5)]
    cell = "#" + "".join(f"{x:02x}" for x in mixed)
    assert contrast(luminance(colours["ink"]), luminance(cell)) >= 4.5
