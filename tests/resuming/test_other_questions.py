"""A folder of pieces that belongs to another question is refused, and the difference named."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hydragrad as hg
from hydragrad.resuming import _close, summary
from tests.hypergradient.recorded import recipe_of, recorded
from tests.resuming.pieces import PROBLEM, QUERIES, asked, changed, contents, measured
from tests.zoo import N_TRAIN

OTHERS: dict[str, dict[str, Any]] = {
    "method": {"method": "gauss-newton"},
    "measurement": {"measurement": measured},
    "by_epoch": {"by_epoch": True},
    "step": {"step": 5},
    "rows": {"train": [1, 2]},
    "rows (": {"groups": [0] * N_TRAIN},
    "aggregate": {"aggregate": "mean"},
    "block": {"block": 3},
    "compile": {"compile": False},
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_question_is_refused_and_the_difference_named(name: str, run: hg.Run, begun: Path) -> None:
    before = contents(begun)
    with pytest.raises(hg.MismatchError, match=rf"begun with another question: {name.replace('(', '[(]')}.* differs"):
        asked(run, begun, **OTHERS[name])
    assert contents(begun) == before


def test_other_queries_and_another_run_are_refused(run: hg.Run, begun: Path, tmp_path: Path) -> None:
    moved = [*QUERIES[:-1], (QUERIES[-1][0] + 1e-7, QUERIES[-1][1])]
    for queries in (QUERIES[::-1], moved, QUERIES[:-1]):
        with pytest.raises(hg.MismatchError, match=r"another question: queries differs"):
            hg.attribute(run, queries, resume=begun)
    other = recorded(recipe_of(PROBLEM, hyper={"lr": 0.05}), tmp_path / "run")
    with pytest.raises(hg.MismatchError, match=r"another question: run differs"):
        asked(other, begun)
    copied = Path(shutil.copytree(run.trajectory.folder, tmp_path / "copy"))
    again = hg.load(copied, model=PROBLEM.build(), loss=PROBLEM.loss, data=PROBLEM.samples)
    asked(again, Path(shutil.copytree(begun, tmp_path / "pieces")))  # the same run in another place


def test_a_measurement_that_was_edited_under_its_name_is_refused(run: hg.Run, tmp_path: Path) -> None:
    asked(run, tmp_path / "pieces", measurement=measured)
    changed.__qualname__ = measured.__qualname__
    with pytest.raises(hg.MismatchError, match=r"another question: measured differs"):
        asked(run, tmp_path / "pieces", measurement=changed)


def test_measured_values_may_differ_by_rounding_only() -> None:
    here = torch.randn(50, dtype=torch.float64)
    assert _close(summary(here), summary(here.float()))
    swapped = here.clone()
    swapped[[3, 4]] = here[[4, 3]]
    assert not _close(summary(here), summary(swapped))
    assert not _close(summary(here), summary(here * 1.01))
    assert not _close(summary(here), None)
