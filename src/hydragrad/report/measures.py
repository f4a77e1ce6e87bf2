"""How good an answer is: rank correlations, precision and recall."""

from typing import NamedTuple

import torch
from torch import Tensor

from hydragrad.errors import MismatchError, message
from hydragrad.shapes import Float, Int


def spearman(a: Float[Tensor, " n"], b: Float[Tensor, " n"]) -> float:
    """Spearman's rank correlation, ties at their average rank; NaN if one of the two is constant.

    Example: ``spearman(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 4.0, 9.0]))`` is 1.0.
    """
    if a.shape != b.shape or a.dim() != 1:
        raise MismatchError(message("nothing to correlate", expected=f"shape {list(a.shape)}", got=list(b.shape)))
    x, y = (ranks - ranks.mean() for ranks in (average_ranks(a), average_ranks(b)))
    scale = float(x.norm() * y.norm())
    return float(x @ y) / scale if scale else float("nan")


def mean_spearman(a: Float[Tensor, "n M"], b: Float[Tensor, "n M"]) -> float:
    """The mean over the columns (queries) of ``spearman``; columns where it is undefined are left out."""
    each = torch.tensor([spearman(x, y) for x, y in zip(a.T, b.T, strict=True)], dtype=torch.float64)
    return float(each.nanmean())


def average_ranks(values: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """Ranks 1..n in float64; equal values share the average of their ranks."""
    _, place, counts = values.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    return (last - (counts - 1) / 2).double()[place]


class Found(NamedTuple):
    """How well the first few of a ranking hit what was sought."""

    precision: float
    recall: float


def precision_recall(signal: Float[Tensor, " N"], sought: Int[Tensor, " s"], first: int) -> Found:
    """Of the ``first`` examples with the largest signal: the part that was sought; of those sought: the part found.

    Example: ``precision_recall(losses, sought=flipped_ids, first=143)``.
    """
    if not 1 <= first <= len(signal) or not len(sought):
        raise MismatchError(
            message("nothing to look for", expected=f"1 to {len(signal)} first, and something sought", got=first)
        )
    top = signal.sort(descending=True, stable=True).indices[:first]
    hits = int(torch.isin(top, sought).sum())
    return Found(hits / first, hits / len(sought))
