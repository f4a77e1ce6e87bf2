"""The bootstrap against scipy, drawn the slow way, and against what is known of correlated normals."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import pearsonr, spearmanr

from hydragrad.report.bootstrap import _correlation, _Ranked, column_pearson, column_spearman, mean_interval


def correlated(n: int, M: int, noise: float) -> tuple[torch.Tensor, torch.Tensor]:
    a = torch.randn(n, M)
    return a, a + noise * torch.randn(n, M)


def test_columns_are_scipys() -> None:
    a, b = correlated(20, 4, 1.0)
    b[:, 1] = b[:, 1].round()
    assert column_spearman(a, b).tolist() == pytest.approx([spearmanr(x, y)[0] for x, y in zip(a.T, b.T, strict=True)])
    assert column_pearson(a, b).tolist() == pytest.approx(
        [pearsonr(x, y)[0] for x, y in zip(a.double().T, b.double().T, strict=True)]
    )


@pytest.mark.parametrize("ties", [False, True])
def test_a_draw_counts_each_row_as_often_as_it_was_taken(ties: bool) -> None:
    a, b = correlated(15, 3, 1.0)
    a, b = (a.round(), (2 * b).round()) if ties else (a, b)
    rows = np.random.default_rng(1).integers(15, size=15)
    counts = np.bincount(rows, minlength=15).astype(float)
    found = _correlation(_Ranked(a).ranks(counts), _Ranked(b).ranks(counts), counts)
    assert found.tolist() == pytest.approx([spearmanr(a[rows, j], b[rows, j])[0] for j in range(3)])


def test_the_interval_covers_and_shrinks() -> None:
    a, b = correlated(40, 10, 1.0)
    mean, low, high = mean_interval(a, b, seed=0)
    assert low < mean < high
    assert low < 6 / math.pi * math.asin(math.sqrt(0.5) / 2) < high  # Spearman of normals with correlation 1/sqrt(2)
    wide = mean_interval(a[:8], b[:8], seed=0)
    assert wide.high - wide.low > 1.5 * (high - low)
    assert mean_interval(a, b, seed=0) == (mean, low, high)
    assert mean_interval(a, b, seed=1) != (mean, low, high)
    assert mean_interval(a, a, seed=0)[:1] == pytest.approx((1.0,))


def test_ties_of_the_draws_do_not_push_the_interval_below_the_mean() -> None:
    a, b = correlated(20, 100, 0.2)
    mean, low, high = mean_interval(a, b, seed=0)
    assert low < mean < high < 1
    a, b = correlated(30, 1, 0.1)
    mean, low, high = mean_interval(a, b, seed=0)
    assert mean_interval(a, -b, seed=0) == pytest.approx((-mean, -high, -low), abs=0.01)


def test_what_is_undefined_is_said_so() -> None:
    a, b = correlated(10, 3, 1.0)
    b[:, 2] = 1.0
    assert math.isnan(float(column_spearman(a, b)[2]))
    assert mean_interval(a, b, 0).mean == pytest.approx(float(column_spearman(a, b)[:2].mean()))
    few = mean_interval(a[:2], b[:2], 0)
    assert math.isnan(few.low)
    assert "too few for an interval" in str(few)
