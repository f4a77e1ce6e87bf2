"""Scores put to the proof: every number against a training loop written out."""

import json
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
from tests.retraining.by_hand import right, test_losses, trained_again
from tests.tasks.small import make_task
from tests.tolerances import UPDATE, assert_close
from tests.trajectory.loops import losses, make_data

TASK = make_task()
QUIET: dict[str, Any] = {"progress": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return hg.train(TASK, tmp_path_factory.mktemp("validation") / "run", checkpoint_every=4)


@pytest.fixture(scope="module")
def scores(run: hg.Run) -> hg.Attribution:
    return hg.attribute(run, TASK.test, check=False, compile=False, progress=False)


@pytest.fixture(scope="module")
def before(run: hg.Run) -> Tensor:
    return test_losses(TASK, trained_again(TASK, run))


def assert_measured(found: hg.Validation, expected: Tensor) -> None:
    """Differences of losses of about 1: what a step's rounding leaves, against that 1."""
    assert float(expected.abs().max()) > 1e-3
    assert_close(found.actual.float() + 1, expected.float() + 1, UPDATE)


def test_leave_one_out(run: hg.Run, scores: hg.Attribution, before: Tensor) -> None:
    found = hg.validate(run, scores, TASK.test, n=6, seed=3, accuracy=right, **QUIET)
    ids = torch.randperm(22, generator=torch.Generator().manual_seed(3))[:6].tolist()
    assert [item.ids for item in found.items] == [(i,) for i in ids]
    assert torch.equal(found.predicted, scores.values[ids].double())
    models = [trained_again(TASK, run, [i]) for i in ids]
    assert_measured(found, torch.stack([test_losses(TASK, model) - before for model in models]))
    assert_close(found.before, before, {torch.float64: 1e-6})
    assert found.accuracy.tolist() == [float(right(model, TASK.test.tensors).mean()) for model in models]
    assert found.accuracy_before == float(right(trained_again(TASK, run), TASK.test.tensors).mean())
    assert found.bitwise
    assert found.correlation.mean > 0.9


def test_half_of_a_stratified_choice_has_the_largest_scores(run: hg.Run, scores: hg.Attribution) -> None:
    found = hg.validate(run, scores, TASK.test, n=8, choice="stratified", **QUIET)
    largest = scores.values.abs().mean(1).argsort(descending=True)[:4].tolist()
    assert [item.ids[0] for item in found.items[:4]] == largest
    assert len({item.ids for item in found.items}) == 8


def test_subsets(run: hg.Run, scores: hg.Attribution, before: Tensor) -> None:
    found = hg.validate(run, scores, TASK.test, metric="subset", n=4, fraction=0.2, **QUIET)
    assert [len(item.ids) for item in found.items] == [4] * 4  # 0.2 * 22
    assert len({item.ids for item in found.items}) == 4
    for k, item in enumerate(found.items):
        assert_close(found.predicted[k].float(), scores.values[list(item.ids)].sum(0), UPDATE)
    assert_measured(
        found, torch.stack([test_losses(TASK, trained_again(TASK, run, i.ids)) for i in found.items]) - before
    )


@pytest.mark.parametrize(("weight", "target"), [(0.0, None), (0.25, 2)])
def test_removal_curves(run: hg.Run, scores: hg.Attribution, before: Tensor, weight: float, target: int | None) -> None:
    targets = None if target is None else [target]
    found = hg.validate(
        run,
        scores,
        TASK.test,
        metric="remove",
        n=2,
        sizes=(0.1, 5),
        targets=targets,
        weight=weight,
        accuracy=right,
        **QUIET,
    )
    column = scores.values.mean(1) if target is None else scores.values[:, target]
    order = column.argsort(descending=True).tolist()
    curves = found.curves(target)
    for kind, chosen in (("helpful", order), ("harmful", order[::-1])):
        for point, size in zip(curves[kind], (2, 5), strict=True):
            model = trained_again(TASK, run, chosen[:size], weight)
            change = test_losses(TASK, model) - before
            expected = change.mean() if target is None else change[target]
            assert point.size == size
            assert point.actual == pytest.approx(float(expected), abs=1e-6)
            assert point.predicted == pytest.approx((1 - weight) * float(column[chosen[:size]].sum()), rel=1e-5)
            assert point.accuracy == float(right(model, TASK.test.tensors).mean())
    drawn = [item for item in found.items if item.kind == "random" and item.size == 5]
    assert len(drawn) == 2
    change = torch.stack([test_losses(TASK, trained_again(TASK, run, i.ids, weight)) for i in drawn]) - before
    change = change.mean() if target is None else change[:, target].mean()
    assert curves["random"][1].actual == pytest.approx(float(change), abs=1e-6)
    assert "accuracy (as trained" in str(found)
    with pytest.raises(hg.MismatchError, match="no curves for target"):
        found.curves(3)


def test_other_labels(run: hg.Run, scores: hg.Attribution, before: Tensor) -> None:
    points, labels = make_data().tensors
    new = (points[7], (labels[7] + 2) % 3)
    found = hg.validate(run, scores, TASK.test, metric="relabel", labels={3: int(labels[3] + 1) % 3, 7: new}, **QUIET)
    expected = []
    for place, shift in ((3, 1), (7, 2)):
        changed = labels.clone()
        changed[place] = (labels[place] + shift) % 3
        expected.append(test_losses(TASK, trained_again(TASK, run, labels=changed)) - before)
        assert found.items[len(expected) - 1].label == int(changed[place])
    assert_measured(found, torch.stack(expected))
    assert torch.equal(found.predicted, scores.values[[3, 7]].double())
    assert "scores know nothing of its new label" in str(found)


def test_aggregates_groups_measurements_and_steps(run: hg.Run, before: Tensor) -> None:
    groups = torch.arange(22) % 4
    asked: dict[str, Any] = {"aggregate": "mean", "groups": groups, "step": 8}

    def doubled(model: torch.nn.Module, batch: Any) -> Tensor:
        return 2 * losses(model, batch)

    scores = hg.attribute(run, TASK.test, measurement=doubled, check=False, compile=False, progress=False, **asked)
    found = hg.validate(run, scores, TASK.test, n=4, measurement=doubled, **asked, **QUIET)
    assert found.actual.shape == (4, 1)
    short = replace_steps(run, 8)
    trained = test_losses(TASK, trained_again(TASK, short))
    for k, item in enumerate(found.items):
        group = int(groups[item.ids[0]])
        assert item.ids == tuple((groups == group).nonzero().flatten().tolist())
        change = 2 * (test_losses(TASK, trained_again(TASK, short, item.ids)) - trained).mean()
        assert float(found.actual[k, 0]) == pytest.approx(float(change), abs=1e-6)
        assert float(found.predicted[k, 0]) == pytest.approx(float(scores.values[group, 0]))


def replace_steps(run: hg.Run, stop: int) -> Any:
    """What ``trained_again`` reads of a run, cut short."""

    class Short:
        steps = run.steps[:stop]

    return Short()


# --- resuming -----------------------------------------------------------------------------------------------------


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
        hg.validate(run, scores, given.pop("queries"), n=1, resume=tmp_path, **QUIET, **given)


def test_another_run_is_refused(run: hg.Run, scores: hg.Attribution, tmp_path: Path) -> None:
    hg.validate(run, scores, TASK.test, n=1, resume=tmp_path / "kept", **QUIET)
    other = hg.train(replace(TASK, seed=1), tmp_path / "run")
    with pytest.raises(hg.MismatchError, match="another question: its run differ"):
        hg.validate(other, scores, TASK.test, n=1, resume=tmp_path / "kept", **QUIET)


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


# --- honesty ------------------------------------------------------------------------------------------------------


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
    assert broken.correlation == whole.correlation
    assert broken.relative_error == whole.relative_error
    assert "1 retraining(s) diverged" in str(broken)


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
    few = words_of(torch.tensor([[0.0], [1], [2], [3]]), torch.tensor([[0.0], [2], [1], [3]]), found)
    assert "by chance" in few
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
        picture = matplotlib.image.imread(found.plot(tmp_path / f"{metric}.png"))
        assert picture.shape[:2] == (676, 832)
        assert picture[..., :3].std() > 0.05
    with pytest.raises(hg.StoreError, match="holds no validation"):
        hg.Validation.load(scores.save(tmp_path / "scores"))
    with pytest.raises(hg.StoreError, match="cannot read"):
        hg.Validation.load(tmp_path / "absent")


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
        hg.validate(run, scores, TASK.test, **QUIET, **changes)


def test_scores_of_elsewhere_are_refused(run: hg.Run, scores: hg.Attribution) -> None:
    with pytest.raises(hg.MismatchError, match=r"not those of this run.*below 22"):
        hg.validate(run, replace(scores, train_ids=scores.train_ids + 5), TASK.test, **QUIET)
    with pytest.raises(hg.NonFiniteError, match="scores are not finite"):
        hg.validate(run, replace(scores, values=scores.values / 0), TASK.test, **QUIET)


def test_a_question_without_a_finite_answer_is_refused(run: hg.Run, scores: hg.Attribution) -> None:
    def endless(model: torch.nn.Module, batch: Any) -> Tensor:
        return losses(model, batch) * math.inf

    with pytest.raises(hg.NonFiniteError, match="as trained has no finite"):
        hg.validate(run, scores, TASK.test, measurement=endless, **QUIET)
