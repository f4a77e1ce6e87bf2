"""The task whose scores are put to the proof, and what the tests of it share."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import hydragrad as hg
from tests.tasks.small import make_task
from tests.tolerances import UPDATE, assert_close

TASK = make_task()
QUIET: dict[str, Any] = {"progress": False}


def assert_measured(found: hg.Validation, expected: Tensor) -> None:
    """Differences of losses of about 1: what a step's rounding leaves, against that 1."""
    assert float(expected.abs().max()) > 1e-3
    assert_close(found.actual.float() + 1, expected.float() + 1, UPDATE)


def cut(found: hg.Validation, predicted: Tensor, actual: Tensor) -> hg.Validation:
    """The validation with other numbers, [n, M]."""
    n, M = actual.shape
    accuracy = torch.full((n,), torch.nan, dtype=torch.float64)
    return replace(
        found,
        predicted=predicted,
        actual=actual,
        items=(found.items * 10)[:n],
        accuracy=accuracy,
        before=found.before[:M],
        query_ids=found.query_ids[:M],
    )


def words_of(predicted: Tensor, actual: Tensor, found: hg.Validation) -> str:
    return str(cut(found, predicted, actual))
