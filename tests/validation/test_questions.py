"""Scores are put to the proof by the question that they answer, and by no other."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset

import hydragrad as hg
from hydragrad import baselines
from tests.retraining.by_hand import test_losses, trained_again
from tests.tolerances import UPDATE, assert_close
from tests.validation.proofs import QUIET, TASK

PLAIN: dict[str, Any] = {"check": False, "compile": False, "progress": False}
REVERSED = Subset(TASK.test, [3, 2, 1, 0])
GROUPS = torch.arange(22) % 5


def squared(model: torch.nn.Module, batch: Any) -> Tensor:
    return TASK.loss(model, batch) ** 2


def test_what_was_asked_is_kept_as_a_loop_measures_it(run: hg.Run, tmp_path: Path) -> None:
    final = test_losses(TASK, trained_again(TASK, run)).double()
    for aggregate, expected in ((None, final), ("mean", final.mean()[None]), ("sum", final.sum()[None])):
        scores = hg.attribute(run, TASK.test, aggregate=aggregate, **PLAIN)
        again = hg.Attribution.load(scores.save(tmp_path / "scores"))
        assert scores.asked is not None
        assert again.asked is not None
        assert_close(scores.asked.measured.float(), expected.float(), UPDATE)
        assert torch.equal(again.asked.measured, scores.asked.measured)
        assert (again.asked.step, again.asked.groups, again.asked.measurement) == (run.num_steps, "", "")
    vectors = hg.hypergradients(run, [1, 2], progress=False).scores(TASK.test)
    for other in (vectors, baselines.gradient_dot(run, TASK.test)):
        assert other.asked is not None
        assert_close(other.asked.measured.float(), final.float(), UPDATE)


@pytest.mark.parametrize(
    ("made", "asked", "words"),
    [
        ({"measurement": squared}, {}, r"4 of 4 columns measure otherwise.*test_questions.squared, and the loss is"),
        ({}, {"measurement": squared}, r"4 of 4 columns.*scores are for the loss, and .*squared is asked about"),
        ({}, {"queries": REVERSED}, r"4 of 4 columns measure otherwise.*in another order"),
        ({"aggregate": [0, 0, 1, 1]}, {"aggregate": [0, 1, 0, 1]}, r"2 of 2 columns"),
        ({"aggregate": "mean"}, {"aggregate": "sum"}, r"1 of 1 columns"),
        ({"step": 5}, {}, r"step differs.*Expected: step=5.*Got: step=10"),
        ({}, {"step": 5}, r"step differs.*Expected: step=10.*Got: step=5"),
        ({"groups": GROUPS}, {}, r"groups differs.*Expected: groups=groups with.*Got: groups=None"),
        ({"groups": GROUPS}, {"groups": GROUPS.flip(0)}, r"groups differs"),
    ],
)
def test_another_question_is_refused(
    run: hg.Run, tmp_path: Path, made: dict[str, Any], asked: dict[str, Any], words: str
) -> None:
    scores = hg.attribute(run, TASK.test, **PLAIN, **made)
    loaded = hg.Attribution.load(scores.save(tmp_path / "scores"))
    given = {"queries": TASK.test, **asked}
    for each in (scores, loaded):
        with pytest.raises(hg.MismatchError, match="(?s)answer another question.*" + words):
            hg.validate(run, each, **given, n=2, **QUIET)
    assert len(hg.validate(run, loaded, TASK.test, n=2, **QUIET, **made).items) == 2
    unknown = replace(scores, asked=None)  # as files of before had it
    assert hg.Attribution.load(unknown.save(tmp_path / "old")).asked is None


def test_what_is_unknown_is_believed(run: hg.Run) -> None:
    scores = hg.attribute(run, TASK.test, **PLAIN)
    assert len(hg.validate(run, replace(scores, asked=None), REVERSED, n=2, **QUIET).items) == 2
    mean = scores.averaged()
    assert len(hg.validate(run, mean, TASK.test, aggregate="mean", n=2, **QUIET).items) == 2
    with pytest.raises(hg.MismatchError, match="1 of 1 columns"):
        hg.validate(run, mean, TASK.test, aggregate="sum", n=2, **QUIET)


def test_smoothed_scores_are_named(run: hg.Run) -> None:
    scores = hg.attribute(run, TASK.test, smoothing=2, **PLAIN)
    assert "smoothed exact scores put to the proof" in str(hg.validate(run, scores, TASK.test, n=2, **QUIET))
