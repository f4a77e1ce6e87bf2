"""When two ways to compute one thing are said to agree."""

import torch
from torch import Tensor

AGREEMENT = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Relative difference of two engines above which one of them computes something else. Rounding is 100 times smaller."""


def close(x: Tensor, y: Tensor) -> bool:
    """Whether x is y to rounding, in relative norm."""
    scale = float(y.norm())
    return float((x - y).norm()) <= AGREEMENT[y.dtype] * scale + 1e-30
