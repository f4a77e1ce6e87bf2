"""Scores put to the proof: every number against a training loop written out."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import hydragrad as hg
from tests.retraining.by_hand import right, test_losses, trained_again
from tests.tolerances import UPDATE, assert_close
from tests.trajectory.loops import losses, make_data
from tests.validation.proofs import QUIET, TASK, assert_measured


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


def test_labels_are_any_integers(run: hg.Run, scores: hg.Attribution) -> None:
    keys = [{3: 2, 5: 1}, {np.int64(3): np.int64(2), np.int64(5): np.uint8(1)}, {3: torch.tensor(2), 5: 1}]
    found = [hg.validate(run, scores, TASK.test, metric="relabel", labels=labels, **QUIET) for labels in keys]
    assert [item.label for item in found[0].items] == [2, 1]
    for other in found[1:]:
        assert other.items == found[0].items
        assert torch.equal(other.actual, found[0].actual)
