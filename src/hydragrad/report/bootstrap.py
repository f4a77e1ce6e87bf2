"""How sure a rank correlation is: a bootstrap over the rows (examples) and the columns (queries)."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragrad.report.measures import spearman
from hydragrad.shapes import Float

DRAWS = 1000
_ALMOST = 1 - 1e-9  # a correlation of 1 has no finite z


class Interval(NamedTuple):
    """A mean with its 95 % interval; NaN where it is undefined."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        sure = f"95 % interval {self.low:.2f} to {self.high:.2f}" if self.low == self.low else "too few for an interval"
        return f"{self.mean:.2f} ({sure})"


def column_spearman(a: Float[Tensor, "n M"], b: Float[Tensor, "n M"]) -> Float[Tensor, " M"]:
    """Spearman's rank correlation of each column; NaN where it is undefined."""
    each = [spearman(x, y) for x, y in zip(a.T, b.T, strict=True)]
    return torch.tensor(each, dtype=torch.float64)


def column_pearson(a: Float[Tensor, "n M"], b: Float[Tensor, "n M"]) -> Float[Tensor, " M"]:
    """The linear correlation of each column; NaN where it is undefined."""
    x, y = (v.double() - v.double().mean(0) for v in (a, b))
    return (x * y).sum(0) / (x.norm(dim=0) * y.norm(dim=0))


def mean_interval(a: Float[Tensor, "n M"], b: Float[Tensor, "n M"], seed: int, draws: int = DRAWS) -> Interval:
    """The mean over the columns of Spearman's correlation, with a 95 % bootstrap interval.

    Each draw takes n rows and M columns with replacement (numpy's generator under ``seed``): the interval covers the
    choice of examples and that of queries. A column in which a draw is constant is left out of its mean. Rows drawn
    twice are ties, which lower a high correlation: the draws are shifted, in Fisher's z = artanh, so that their mean
    is the mean observed (on normal samples that covered in 92 to 99 % of cases, plain percentiles in 87 to 99 %).
    """
    mean = float(column_spearman(a, b).nanmean())
    n, M = a.shape
    if n < 3:
        return Interval(mean, float("nan"), float("nan"))
    generator = np.random.default_rng(seed)
    first, second = _Ranked(a), _Ranked(b)
    means = []
    for _ in range(draws):
        counts = np.bincount(generator.integers(n, size=n), minlength=n).astype(np.float64)
        columns = generator.integers(M, size=M)
        with np.errstate(invalid="ignore", divide="ignore"):
            each = _correlation(first.ranks(counts), second.ranks(counts), counts)[columns]
        each = each[np.isfinite(each)]
        if len(each):
            means.append(each.mean())
    if not means or mean != mean:
        return Interval(mean, float("nan"), float("nan"))
    drawn, observed = (np.arctanh(np.clip(x, -_ALMOST, _ALMOST)) for x in (means, mean))
    low, high = np.tanh(np.quantile(drawn, [0.025, 0.975]) - (drawn.mean() - observed))
    return Interval(mean, float(low), float(high))


class _Ranked:
    """A matrix whose columns can be ranked again and again, with each row as often as a draw took it."""

    def __init__(self, values: Tensor) -> None:
        array: Any = values.double().numpy()
        ordered = np.sort(array, axis=0)
        self._below, self._equal = (
            np.stack([np.searchsorted(ordered[:, j], array[:, j], side) for j in range(array.shape[1])], axis=1)
            for side in ("left", "right")
        )
        self._order = np.argsort(array, axis=0, kind="stable")

    def ranks(self, counts: Any) -> Any:
        """Average ranks [n, M] where row i occurs ``counts[i]`` times."""
        total = np.concatenate([np.zeros((1, self._order.shape[1])), np.cumsum(counts[self._order], axis=0)])
        below = np.take_along_axis(total, self._below, axis=0)
        upto = np.take_along_axis(total, self._equal, axis=0)
        return (below + upto + 1) / 2


def _correlation(x: Any, y: Any, counts: Any) -> Any:
    weights = counts[:, None] / counts.sum()
    x, y = x - (weights * x).sum(0), y - (weights * y).sum(0)
    scale = np.sqrt((weights * x * x).sum(0) * (weights * y * y).sum(0))
    return np.where(scale > 1e-12, (weights * x * y).sum(0) / np.where(scale > 1e-12, scale, 1), np.nan)
