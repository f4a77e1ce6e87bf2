"""What a validation says of itself: its setting, its words, its refusals."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import joblib
import matplotlib.image
import pytest
import torch
from torch import Tensor

import hydragrad as hg
from hydragrad.retraining.counterfactual import Change
from hydragrad.retraining.measuring import Outcome, Retrainer
from tests.trajectory.loops import losses
from tests.validation.proofs import QUIET, TASK, cut, words_of


def test_where_replay_is_not_bitwise_nothing_starts_early(
    run: hg.Run, scores: hg.Attribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    outcome: Callable[..., Outcome] = Retrainer.outcome

    def watched(self: Retrainer, change: Change, *, early: bool, threads: int) -> Outcome:
        seen.append(early)
        return replace(outcome(self, change, early=early, threads=threads), bitwise=False)

    monkeypatch.setattr(Retrainer, "outcome", watched)
    found = hg.validate(run, scores, TASK.test, n=2, **QUIET)
    assert seen == [True, False, False]
    assert "do not give the recorded model bit for bit" in str(found)
    monkeypatch.undo()
    assert "bit for bit" not in str(hg.validate(run, scores, TASK.test, n=2, **QUIET))


def test_the_recorded_end_is_compared_bit_for_bit(run: hg.Run) -> None:
    from hydragrad.hypergradient.queries import Columns
    from hydragrad.retraining.measuring import Question

    question = Question(run.trajectory.folder, run.problem, TASK.test, Columns.make(None, 4), run.num_steps)
    retrainer = Retrainer(question, run)
    assert retrainer.outcome(Change(), early=True, threads=1).bitwise
    assert not retrainer.outcome(Change((2,), 1 + 1e-3), early=True, threads=1).bitwise
    end = run.trajectory.state(run.num_steps)
    last = list(end.params)[-1]
    assert retrainer._is_recorded(end)
    assert not retrainer._is_recorded(replace(end, params=end.params | {last: end.params[last] + 1e-6}))


def test_threads_are_those_asked_for_while_retraining(
    run: hg.Run, scores: hg.Attribution, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    measured = Retrainer.measured

    def watched(self: Retrainer, state: hg.State) -> Tensor:
        seen.append(torch.get_num_threads())
        return measured(self, state)

    monkeypatch.setattr(Retrainer, "measured", watched)
    before = torch.get_num_threads()
    with joblib.parallel_config(backend="threading"):
        torch.set_num_threads(3)
        try:
            hg.validate(run, scores, TASK.test, n=2, jobs=2, **QUIET)
            assert torch.get_num_threads() == 3
            hg.validate(run, scores, TASK.test, n=1, jobs=1, **QUIET)
        finally:
            torch.set_num_threads(before)
    assert seen == [1] * 4 + [3] * 3, "the plan's measurement, as trained, and each change"


def test_diverged_retrainings_are_left_out_and_told(run: hg.Run, scores: hg.Attribution) -> None:
    found = hg.validate(run, scores, TASK.test, n=5, **QUIET)
    broken = replace(found, actual=found.actual.clone())
    broken.actual[1, 0] = torch.nan
    others = [0, 2, 3, 4]
    whole = cut(found, found.predicted[others], found.actual[others])
    assert broken.correlation.mean == whole.correlation.mean
    assert broken.relative_error == whole.relative_error
    assert "1 retraining(s) diverged" in str(broken)


def test_words_follow_the_numbers(run: hg.Run, scores: hg.Attribution) -> None:
    found = hg.validate(run, scores, TASK.test, n=5, **QUIET)
    real = torch.randn(30, 4, dtype=torch.float64)
    noise = torch.randn(30, 4, dtype=torch.float64)
    assert "almost as real retraining does" in words_of(real, real, found)
    assert "roughly as real retraining" in words_of(real + noise, real, found)
    assert "say only a little" in words_of(real + 2.5 * noise, real, found)
    assert "say nothing" in words_of(noise, real, found)
    assert "say the opposite" in words_of(-real, real, found)
    assert "undefined" in words_of(real, 0 * real, found)
    assert "by chance" in words_of(torch.arange(6.0)[:, None], torch.tensor([[0.0], [4], [1], [3], [2], [5]]), found)
    few = words_of(real[:5], real[:5], found)
    assert "too few for an interval" in few
    assert "so: 5 retraining(s) are too few for a conclusion" in few
    assert "seed 0" in few
    assert found.relative_error == pytest.approx(float((found.predicted - found.actual).norm() / found.actual.norm()))


def test_saved_tabled_and_drawn(run: hg.Run, scores: hg.Attribution, tmp_path: Path) -> None:
    for metric in ("loo", "remove"):
        found = hg.validate(run, scores, TASK.test, metric=metric, n=3, seed=5, **QUIET)
        again = hg.Validation.load(found.save(tmp_path / f"new/{metric}.safetensors"))
        assert str(again) == str(found)
        assert again.items == found.items
        assert torch.equal(again.actual, found.actual)
        table = found.to_pandas()
        assert len(table) == found.actual.numel()
        row = table[(table["item"] == 2) & (table["query"] == 1)].iloc[0]
        assert row["actual"] == float(found.actual[2, 1])
        assert row["predicted"] == float(found.predicted[2, 1])
        assert row["ids"] == found.items[2].ids
        assert "seed 5" in str(found)
        assert ("no interval: one removal lies within the next" in str(found)) == (metric == "remove")
        assert math.isnan(found.correlation.low) or metric == "loo"
        picture = matplotlib.image.imread(found.plot(tmp_path / f"{metric}.png"))
        assert picture.shape[:2] == (676, 832)
        assert picture[..., :3].std() > 0.05
    with pytest.raises(hg.StoreError, match="holds no validation"):
        hg.Validation.load(scores.save(tmp_path / "scores"))
    with pytest.raises(hg.StoreError, match="absent is missing"):
        hg.Validation.load(tmp_path / "absent")
    altered = bytearray((tmp_path / "new/loo.safetensors").read_bytes())
    altered[-9] ^= 1
    (tmp_path / "altered").write_bytes(altered)
    with pytest.raises(hg.StoreError, match="altered was altered"):
        hg.Validation.load(tmp_path / "altered")
    with pytest.raises(hg.StoreError, match="cannot write"):
        found.plot(tmp_path / "altered" / "x.png")


def test_the_plan_comes_first_and_is_near(run: hg.Run, scores: hg.Attribution, capsys: Any) -> None:
    seen: list[hg.RetrainingPlan] = []
    found = hg.validate(run, scores, TASK.test, n=3, on_plan=seen.append, **QUIET)
    firsts = [min(s.index for s in run.steps if item.ids[0] in s.batches[0]) // 4 * 4 for item in found.items]
    assert seen[0].steps == 10 + sum(10 - first for first in firsts)
    assert seen[0].retrainings == 4
    assert found.plan == str(seen[0])
    assert capsys.readouterr().err == ""
    hg.validate(run, scores, TASK.test, n=3)
    assert "plan: 4 retrainings" in capsys.readouterr().err


# --- refusals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"metric": "lds"}, hg.UnsupportedError, "unknown metric.*'loo' or 'subset'"),
        ({"n": 0}, hg.MismatchError, "at least 1"),
        ({"choice": "best"}, hg.UnsupportedError, "'uniform' or 'stratified'"),
        ({"metric": "subset", "fraction": 0.0}, hg.MismatchError, "no such part"),
        ({"metric": "subset", "fraction": 23}, hg.MismatchError, "no such part.*1 to 22"),
        ({"metric": "remove", "sizes": (1.5,)}, hg.MismatchError, "no such part"),
        ({"metric": "remove", "targets": [4]}, hg.MismatchError, r"no such queries.*\[4\]"),
        ({"metric": "remove", "targets": []}, hg.MismatchError, "no such queries"),
        ({"metric": "subset", "fraction": 1.0}, hg.MismatchError, "no such part.*1 to 21 rows.*Got: 1.0"),
        ({"metric": "subset", "fraction": 22}, hg.MismatchError, "no such part.*some are left to train on"),
        ({"metric": "relabel", "labels": {3: 77}}, hg.MismatchError, r"in place of the examples \[3\].*Target 77"),
        ({"metric": "relabel", "labels": {3.5: 1}}, hg.MismatchError, "no row in the scores.*3.5"),
        ({"metric": "relabel", "labels": {}}, hg.MismatchError, "nothing to relabel"),
        ({"metric": "relabel", "labels": {40: 1}}, hg.MismatchError, "no row in the scores.*40"),
        ({"metric": "relabel", "labels": {4: 1}, "groups": torch.arange(22)}, hg.UnsupportedError, "groups cannot"),
        ({"aggregate": "mean"}, hg.MismatchError, r"not those of these queries.*4 columns.*1 columns"),
        ({"groups": torch.arange(22) % 3}, hg.MismatchError, r"not those of these groups.*3 rows.*22"),
        ({"step": 11}, hg.MismatchError, "no such step"),
    ],
)
def test_wrong_questions_are_refused(
    run: hg.Run, scores: hg.Attribution, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    with pytest.raises(kind, match=words):
        hg.validate(run, replace(scores, asked=None), TASK.test, **QUIET, **changes)


def test_scores_of_elsewhere_are_refused(run: hg.Run, scores: hg.Attribution, tmp_path: Path) -> None:
    other = hg.train(replace(TASK, seed=1), tmp_path / "other")
    saved = hg.Attribution.load(scores.save(tmp_path / "scores"))
    for stranger in (scores, saved, scores.averaged()):
        with pytest.raises(hg.MismatchError, match=r"not those of this run.*a run with other steps"):
            hg.validate(other, stranger, TASK.test, aggregate=None if len(stranger.query_ids) > 1 else "mean", **QUIET)
    again = hg.train(TASK, tmp_path / "again", checkpoint_every=2)
    assert hg.validate(again, saved, TASK.test, n=2, **QUIET).run == scores.run, "the same training, stored otherwise"
    with pytest.raises(hg.MismatchError, match=r"not those of this run.*below 22"):
        hg.validate(run, replace(scores, train_ids=scores.train_ids + 5), TASK.test, **QUIET)
    with pytest.raises(hg.NonFiniteError, match="scores are not finite"):
        hg.validate(run, replace(scores, values=scores.values / 0), TASK.test, **QUIET)


def test_a_question_without_a_finite_answer_is_refused(run: hg.Run, scores: hg.Attribution) -> None:
    def endless(model: torch.nn.Module, batch: Any) -> Tensor:
        return losses(model, batch) * math.inf

    with pytest.raises(hg.NonFiniteError, match="as trained has no finite"):
        hg.validate(run, scores, TASK.test, measurement=endless, **QUIET)
