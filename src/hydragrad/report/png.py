"""Pixels as a PNG, within the page: no file, and no package that draws."""

import base64
import struct
import zlib

import torch
import torch.nn.functional as F
from torch import Tensor

from hydragrad.errors import MismatchError, message

_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOUR = 0, 2  # PNG's colour types


def is_image(value: object) -> bool:
    """Whether this looks like an image: a tensor [1 | 3, h, w] with at least four pixels a side."""
    return isinstance(value, Tensor) and value.dim() == 3 and value.shape[0] in (1, 3) and min(value.shape[1:]) >= 4


def pixels_of(image: Tensor, most: int) -> Tensor:
    """Bytes [h, w] or [h, w, 3] of an image [h, w], [1, h, w] or [3, h, w], at most ``most`` pixels a side.

    Integers are taken as 0 to 255, numbers within [0, 1] as such; others (normalised images) are stretched from their
    own least to their largest. Raises MismatchError for other shapes.
    """
    if image.dim() == 2:
        image = image[None]
    if not is_image(image):
        raise MismatchError(
            message("not an image", expected="shape [h, w], [1, h, w] or [3, h, w]", got=list(image.shape))
        )
    values = image.detach().to("cpu", torch.float32).nan_to_num(0.0, 0.0, 0.0)
    if not image.is_floating_point():
        values = values / 255
    low, high = float(values.min()), float(values.max())
    if low < 0 or high > 1:
        values = (values - low) / (high - low)
    if (longest := max(values.shape[1:])) > most:
        size = [max(1, round(side * most / longest)) for side in values.shape[1:]]
        values = F.interpolate(values[None], size=size, mode="area")[0]
    levels = (values.clamp(0, 1) * 255).round().to(torch.uint8)
    return levels[0] if len(levels) == 1 else levels.permute(1, 2, 0).contiguous()


def png(pixels: Tensor) -> bytes:
    """The PNG file of bytes [h, w] (grey) or [h, w, 3]."""
    height, width = pixels.shape[:2]
    colour = _GREY if pixels.dim() == 2 else _COLOUR
    rows = pixels.reshape(height, -1)
    unfiltered = torch.cat([torch.zeros(height, 1, dtype=torch.uint8), rows], dim=1)  # each row begins with its filter
    header = struct.pack(">IIBBBBB", width, height, 8, colour, 0, 0, 0)
    body = zlib.compress(unfiltered.numpy().tobytes(), 9)
    return _SIGNATURE + _chunk(b"IHDR", header) + _chunk(b"IDAT", body) + _chunk(b"IEND", b"")


def data_uri(pixels: Tensor) -> str:
    """The PNG as the address of an ``img``."""
    return "data:image/png;base64," + base64.b64encode(png(pixels)).decode()


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
