"""The interval against scipy, done the slow way, and against what is known of correlated normals."""

import itertools
import math

import pytest
import torch
from scipy.stats import kendalltau, pearsonr, spearmanr
from scipy.stats import t as student_t

from experiments.intervals import covered
from hydragrad.report.intervals import _jackknife, column_pearson, column_spearman, mean_interval, student


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
def test_what_the_jackknife_leaves_out_is_scipys(ties: bool) -> None:
    a, b = correlated(15, 3, 1.0)
    a, b = (a.round(), (2 * b).round()) if ties else (a, b)
    r, without, tau = _jackknife(a.double().numpy(), b.double().numpy())
    assert r.tolist() == pytest.approx([spearmanr(x, y)[0] for x, y in zip(a.T, b.T, strict=True)])
    for i in range(15):
        rest = [row for row in range(15) if row != i]
        expected = [spearmanr(x[rest], y[rest])[0] for x, y in zip(a.T, b.T, strict=True)]
        assert without[i].tolist() == pytest.approx(expected)
    assert tau.tolist() == pytest.approx([kendalltau(x, y)[0] for x, y in zip(a.T, b.T, strict=True)])


@pytest.mark.parametrize("freedom", [2.0, 3.5, 10.0, 98.0])
def test_students_quantile_is_scipys(freedom: float) -> None:
    assert student(freedom) == pytest.approx(float(student_t.ppf(0.975, freedom)), rel=0.01)


def test_the_interval_covers_and_shrinks() -> None:
    a, b = correlated(40, 10, 1.0)
    mean, low, high = mean_interval(a, b)
    assert low < mean < high
    assert low < 6 / math.pi * math.asin(math.sqrt(0.5) / 2) < high  # Spearman of normals with correlation 1/sqrt(2)
    wide = mean_interval(a[:8], b[:8])
    assert wide.high - wide.low > 1.5 * (high - low)
    assert mean_interval(a, -b) == pytest.approx((-mean, -high, -low))


@pytest.mark.parametrize(
    ("n", "M", "noise", "kind", "least", "widest"),
    [
        (6, 1, 0.01, "normal", 0.93, 0.5),
        (10, 1, 0.1, "normal", 0.93, 0.3),
        (12, 30, 0.05, "normal", 0.93, 0.05),
        (30, 1, 0.01, "normal", 0.93, 0.01),
        (30, 1, 1.0, "normal", 0.92, 0.55),
        (30, 10, 0.3, "shared", 0.92, 0.15),
        (12, 30, 0.3, "unequal", 0.92, 0.2),
        (20, 20, 0.1, "mixed", 0.90, 0.2),
    ],
)
def test_it_covers_the_correlation_of_all_there_could_be(
    n: int, M: int, noise: float, kind: str, least: float, widest: float
) -> None:
    """Of 100 samples, always the same."""
    coverage, width = covered(n, M, noise, kind, 100)
    assert coverage >= least
    assert width <= widest


def swapped(n: int, *at: int) -> tuple[torch.Tensor, torch.Tensor]:
    order = torch.arange(n, dtype=torch.float64)
    other = order.clone()
    for place in at:
        other[[place, place + 1]] = other[[place + 1, place]]
    return order[:, None], other[:, None]


def test_near_one_it_is_narrow_and_holds_the_mean() -> None:
    low = {k: mean_interval(*swapped(30, *range(3, 3 + 6 * k, 6))).low for k in range(5)}
    assert list(low.values()) == sorted(low.values(), reverse=True), "better agreement, higher ends"
    assert low[4] > 0.99
    assert 0.998 < low[0] < 1
    assert mean_interval(*swapped(30)).high == mean_interval(*swapped(30, 14)).high == 1.0
    assert 0.5 < mean_interval(*swapped(6)).low < 0.7
    for n, M, noise in itertools.product((6, 8, 12), (1, 2, 20), (0.01, 0.1, 2.0)):
        a, b = correlated(n, M, noise)
        for sign in (1, -1):
            mean, least, most = mean_interval(a, sign * b)
            assert -1 <= least <= mean <= most <= 1


def test_a_change_that_one_row_alone_shows_is_no_certainty() -> None:
    a, b = torch.arange(8.0)[:, None], torch.zeros(8, 1)
    b[7] = 1.0
    mean, low, high = mean_interval(a, b)
    assert low < 0 < mean < high


def test_what_is_undefined_is_said_so() -> None:
    a, b = correlated(10, 3, 1.0)
    b[:, 2] = 1.0
    assert math.isnan(float(column_spearman(a, b)[2]))
    assert mean_interval(a, b).mean == pytest.approx(float(column_spearman(a, b)[:2].mean()))
    few = mean_interval(a[:5], b[:5])
    assert math.isnan(few.low)
    assert math.isnan(few.high)
    assert "too few for an interval" in str(few)
