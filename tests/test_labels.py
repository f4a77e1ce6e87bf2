"""Labels in samples: read, and changed without a change of type."""

from typing import Any, NamedTuple

import pytest
import torch

import hydragrad as hg
from hydragrad.labels import label_of, labels_of, with_label


class Pair(NamedTuple):
    image: Any
    label: Any


@pytest.mark.parametrize("sample", [(0.5, 3), [0.5, torch.tensor(3)], Pair("x", 3), (1, 2, torch.tensor([3]))])
def test_a_label_is_the_last_integer(sample: Any) -> None:
    assert label_of([sample], 0) == 3
    changed = with_label(sample, 7)
    assert type(changed) is type(sample)
    assert type(changed[-1]) is type(sample[-1])
    assert label_of([changed], 0) == 7
    assert changed[:-1] == sample[:-1]
    assert label_of([sample], 0) == 3, "the given sample stays as it was"


@pytest.mark.parametrize("sample", [(0.5,), 3, (0.5, 3.0), (0.5, torch.tensor(3.0)), (0.5, torch.tensor([1, 2])), "ab"])
def test_other_samples_have_none(sample: Any) -> None:
    assert label_of([sample], 0) is None
    assert labels_of([(0, 1), sample]) is None
    with pytest.raises(hg.MismatchError, match=r"no label that could be changed.*relabel="):
        with_label(sample, 1)


def test_all_labels() -> None:
    assert labels_of([(0, 4), (0, torch.tensor(2))]).tolist() == [4, 2]  # type: ignore[union-attr]
