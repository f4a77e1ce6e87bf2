"""How sure a mean rank correlation is: an interval for the choice of the rows (examples) and of the columns (queries).

Spearman's correlation r of n rows lies below that of all rows there could be, most of all near 1, where a tiny noise
swaps neighbours; with Kendall's tau the estimate without that bias is rho = ((n + 1) r - 3 tau) / (n - 2) (Hoeffding).
The variance is that of the jackknife over rows, plus that of the columns, less what both count (each row in each
column by itself):

    I[i, j] = r_j without row i, less its mean over i                 V_rows = (n - 1) / n sum_i mean_j(I)^2
    V_cols  = var_j(r_j) / M,      V_both = (n - 1) / n sum_ij I^2 / M^2,       V = V_rows + V_cols - V_both

The interval is symmetric in Fisher's z = artanh, with Student's t at Satterthwaite's degrees of freedom, from the lower
of mean r and mean rho down and from the higher one up. Two limits keep it steady where few rows are almost in order:

- n rows show no correlation better than 1 - swap, swap = 6 / (n (n^2 - 1)): half a swap of neighbours from perfect
  order; sqrt(V) is at least that, and a higher estimate cannot be told from 1;
- of few rows, one swap moves the jackknife too far: there V_rows gives no interval much wider than normal theory's
  for one column, var z = (1 + r^2 / 2) / (n - 3) (Bonett and Wright); of many rows the jackknife is believed.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from hydragrad.report.measures import spearman
from hydragrad.shapes import Float

LEAST = 6
"""Fewer rows give no interval: up to five fall into perfect order too easily."""
_NORMAL = 1.959964  # the 97.5 % quantile


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


def mean_interval(a: Float[Tensor, "n M"], b: Float[Tensor, "n M"]) -> Interval:
    """The mean over the columns of Spearman's correlation, with a 95 % interval; low <= mean <= high.

    It covers the choice of rows and that of columns; a column that is constant is left out. NaN ends for fewer than
    ``LEAST`` rows. Its coverage in simulations is in docs/validation.md (`python -m experiments.intervals`).
    """
    nothing = float("nan")
    n, defined = len(a), torch.stack([(v != v[:1]).any(0) for v in (a, b)]).all(0)
    if n < LEAST or not bool(defined.any()):
        return Interval(float(column_spearman(a, b).nanmean()), nothing, nothing)
    r, without, tau = _jackknife(a[:, defined].double().numpy(), b[:, defined].double().numpy())
    mean, unbiased = float(r.mean()), float(np.mean(((n + 1) * r - 3 * tau) / (n - 2)))
    swap = 6 / (n * (n * n - 1))
    shown = min(abs(mean), 1 - swap)
    normal = math.sqrt((1 + shown**2 / 2) / (n - 3)) * (1 - shown**2)
    sure = _half_width(without - without.mean(0), r, _NORMAL * normal * 1.25 * max(1.0, n / 20), swap)
    lower, higher = sorted((mean, unbiased))
    return Interval(mean, min(mean, -_raised(-lower, sure, swap)), max(mean, _raised(higher, sure, swap)))


def _raised(r: float, by: float, swap: float) -> float:
    """Raise r along Fisher's z by a step that is ``by`` in r; 1 where the order cannot be told from perfect order."""
    if r >= 1 - swap:
        return 1.0
    r = max(r, swap - 1)
    return math.tanh(math.atanh(r) + by / (1 - r * r))


def _half_width(influence: Any, r: Any, most: float, least: float) -> float:
    """Half of the interval: t sqrt(V), with at most ``most`` of it from the rows, and sqrt(V) at least ``least``."""
    n, M = influence.shape
    rows = (n - 1) / n * float((influence.mean(1) ** 2).sum())
    columns = float(r.var(ddof=1)) / M if M > 1 else 0.0
    both = (n - 1) / n * float((influence**2).sum()) / M**2 if M > 1 else 0.0
    if rows + columns == 0.0:
        return student(n - 2) * least
    spread = rows**2 / (n - 2) + (columns**2 / (M - 1) if M > 1 else 0.0)
    t = student(max((rows + columns) ** 2 / spread, 2.0))
    rows = min(rows, (most / t) ** 2)
    return t * math.sqrt(max(rows, columns, rows + columns - both, least**2))


def student(freedom: float) -> float:
    """The 97.5 % quantile of Student's t for 2 or more degrees of freedom (Abramowitz and Stegun 26.7.5; to 1 %)."""
    z = _NORMAL
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def _jackknife(x: Any, y: Any) -> tuple[Any, Any, Any]:
    """Spearman's correlation [M], the same without row i [n, M] (0 where it is undefined); Kendall's tau-b [M]."""
    n, M = x.shape
    first, second, without = np.empty((n, M)), np.empty((n, M)), np.empty((n, M))
    together, of_x, of_y = np.zeros(M), np.zeros(M), np.zeros(M)
    for i in range(n):
        above_x, above_y = np.sign(x - x[i]), np.sign(y - y[i])
        first[i], second[i] = ((n + 1 - above.sum(0)) / 2 for above in (above_x, above_y))  # average ranks
        together += (above_x * above_y).sum(0)
        of_x += np.abs(above_x).sum(0)
        of_y += np.abs(above_y).sum(0)
    for i in range(n):
        rest = np.arange(n) != i  # ranks among the others: those above lose one, those equal a half
        ranks = (r - (1 + np.sign(r - r[i])) / 2 for r in (first, second))
        without[i] = _correlation(*(r[rest] for r in ranks))
    return _correlation(first, second), without, together / np.sqrt(of_x * of_y)


def _correlation(x: Any, y: Any) -> Any:
    x, y = x - x.mean(0), y - y.mean(0)
    scale = np.sqrt((x * x).sum(0) * (y * y).sum(0))
    return np.where(scale > 1e-12, (x * y).sum(0) / np.where(scale > 1e-12, scale, 1), 0.0)
