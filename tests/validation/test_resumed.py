"""A stopped validation goes on; another question, and a damaged folder, are refused."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hydragrad as hg
from hydragrad.retraining.counterfactual import Change
from hydragrad.retraining.measuring import Outcome, Retrainer
from tests.retraining.by_hand import right
from tests.tasks.small import make_task
from tests.trajectory.loops import make_data
from tests.validation.proofs import QUIET, TASK


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Change]:
    """The changes that were really retrained."""
    done: list[Change] = []
    outcome: Callable[..., Outcome] = Retrainer.outcome

    def counting(self: Retrainer, change: Change, **options: Any) -> Outcome:
        if len(done) == 4:
            raise KeyboardInterrupt
        done.append(change)
        return outcome(self, change, **options)

    monkeypatch.setattr(Retrainer, "outcome", counting)
    return done


def test_a_stopped_validation_goes_on(
    run: hg.Run, scores: hg.Attribution, tmp_path: Path, counted: list[Change], monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    with pytest.raises(KeyboardInterrupt):
        hg.validate(run, scores, TASK.test, n=6, resume=kept, accuracy=right, **QUIET)
    assert len(list(kept.glob("*.safetensors"))) == 4
    (kept / ".half.safetensors.1.tmp").write_bytes(b"killed while writing")
    first, counted[:] = list(counted), []
    plans = []
    found = hg.validate(run, scores, TASK.test, n=6, resume=kept, accuracy=right, on_plan=plans.append, **QUIET)
    assert len(counted) == 3
    assert not any(change in first for change in counted)
    assert (plans[0].retrainings, plans[0].kept) == (7, 4)
    monkeypatch.undo()
    whole = hg.validate(run, scores, TASK.test, n=6, accuracy=right, **QUIET)
    assert torch.equal(found.actual, whole.actual)
    assert torch.equal(found.accuracy, whole.accuracy)


def test_what_was_kept_serves_other_scores(
    run: hg.Run, scores: hg.Attribution, tmp_path: Path, counted: list[Change]
) -> None:
    hg.validate(run, scores, TASK.test, n=3, resume=tmp_path, **QUIET)
    counted.clear()
    free = hg.attribute(run, TASK.test, method="hessian-free", check=False, compile=False, progress=False)
    found = hg.validate(run, free, TASK.test, n=4, resume=tmp_path, **QUIET)
    assert len(counted) == 1
    assert found.method == "hessian-free"


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("queries", {"queries": make_task(test=torch.utils.data.Subset(make_data(), [0, 1, 2, 5])).test}),
        ("measurement", {"measurement": right}),
        ("step", {"step": 8}),
        ("accuracy", {"accuracy": right}),
    ],
)
def test_another_question_is_refused(
    run: hg.Run, scores: hg.Attribution, tmp_path: Path, name: str, changes: dict[str, Any]
) -> None:
    hg.validate(run, scores, TASK.test, n=1, resume=tmp_path, **QUIET)
    given = {"queries": TASK.test, **changes}
    with pytest.raises(hg.MismatchError, match=rf"another question: its {name} differ.*a folder of its own"):
        hg.validate(run, replace(scores, asked=None), given.pop("queries"), n=1, resume=tmp_path, **QUIET, **given)


def test_another_run_is_refused(run: hg.Run, scores: hg.Attribution, tmp_path: Path) -> None:
    hg.validate(run, scores, TASK.test, n=1, resume=tmp_path / "kept", **QUIET)
    other = hg.train(replace(TASK, seed=1), tmp_path / "run")
    with pytest.raises(hg.MismatchError, match="another question: its run differ"):
        hg.validate(other, replace(scores, run="", asked=None), TASK.test, n=1, resume=tmp_path / "kept", **QUIET)


def test_the_folder_keeps_its_number_of_threads(
    run: hg.Run, scores: hg.Attribution, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads = torch.get_num_threads()
    hg.validate(run, scores, TASK.test, n=1, resume=tmp_path, **QUIET)
    question = json.loads((tmp_path / "question.json").read_text())
    question["threads"] = threads + 1
    (tmp_path / "question.json").write_text(json.dumps(question))
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    seen, measured = [], Retrainer.measured
    monkeypatch.setattr(
        Retrainer, "measured", lambda self, state: seen.append(torch.get_num_threads()) or measured(self, state)
    )
    assert hg.validate(run, scores, TASK.test, n=1, resume=tmp_path, **QUIET).threads == threads + 1
    assert seen[-2:] == [threads + 1] * 2, "as trained, and the change"
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"threads":"x"}'])
def test_a_damaged_folder_is_refused(run: hg.Run, scores: hg.Attribution, tmp_path: Path, content: str) -> None:
    (tmp_path / "question.json").write_text(content)
    with pytest.raises(hg.StoreError, match=r"question.json cannot be read"):
        hg.validate(run, scores, TASK.test, n=1, resume=tmp_path, **QUIET)


def test_a_damaged_outcome_is_refused(run: hg.Run, scores: hg.Attribution, tmp_path: Path) -> None:
    hg.validate(run, scores, TASK.test, n=1, resume=tmp_path, **QUIET)
    next(tmp_path.glob("*.safetensors")).write_bytes(b"not this")
    with pytest.raises(hg.StoreError, match="cannot be read"):
        hg.validate(run, scores, TASK.test, n=1, resume=tmp_path, **QUIET)
