"""The measures against scipy and against counting by hand."""

import math

import pytest
import torch
from scipy.stats import rankdata, spearmanr

from hydragrad.errors import MismatchError
from hydragrad.report.measures import average_ranks, mean_spearman, precision_recall, spearman


@pytest.mark.parametrize("ties", [1, 7])
def test_spearman_is_scipys(ties: int) -> None:
    a, b = torch.randn(50), torch.randn(50)
    a, b = (a * ties).round() if ties > 1 else a, b + 0.5 * a
    assert spearman(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy())[0], abs=1e-12)
    assert average_ranks(a).tolist() == rankdata(a.numpy()).tolist()


def test_spearman_is_one_for_any_rising_function_and_nan_for_a_constant() -> None:
    x = torch.randn(20)
    assert spearman(x, x.exp()) == pytest.approx(1.0)
    assert spearman(x, -(x**3)) == pytest.approx(-1.0)
    assert math.isnan(spearman(x, torch.ones(20)))
    with pytest.raises(MismatchError, match=r"\[20\].*\[3\]"):
        spearman(x, x[:3])


def test_the_mean_is_over_the_columns_where_it_is_defined() -> None:
    a = torch.tensor([[1.0, 1.0, 5.0], [2.0, 2.0, 5.0], [3.0, 3.0, 5.0]])
    b = torch.tensor([[1.0, 9.0, 1.0], [5.0, 7.0, 2.0], [7.0, 8.0, 3.0]])
    assert mean_spearman(a, b) == pytest.approx((1.0 - 0.5) / 2)


def test_precision_and_recall_by_hand() -> None:
    signal = torch.tensor([0.9, 0.1, 0.8, 0.7, 0.2, 0.6])
    sought = torch.tensor([0, 3, 4, 1])
    assert precision_recall(signal, sought, first=3) == (2 / 3, 2 / 4)  # 0 and 3 of the first 0, 2, 3
    assert precision_recall(signal, sought, first=6) == (4 / 6, 1.0)
    with pytest.raises(MismatchError, match="1 to 6 first"):
        precision_recall(signal, sought, first=7)
    with pytest.raises(MismatchError, match="something sought"):
        precision_recall(signal, torch.tensor([], dtype=torch.int64), first=2)
