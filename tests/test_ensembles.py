"""What models trained on halves of the data say of the examples: the replays, and what is taken from them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hydragrad as hg
from hydragrad.report.measures import precision_recall
from hydragrad.retraining import carrying
from hydragrad.signals.ensembles import halves
from hydragrad.tasks.digits import digits
from tests.retraining.by_hand import trained_again
from tests.tasks.small import make_task
from tests.tolerances import ORACLE, assert_close
from tests.trajectory.loops import CLASSES, losses, make_data

TASK = make_task()
POINTS, LABELS = make_data().tensors
QUIET: dict[str, Any] = {"signal": "ensemble", "progress": False}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return hg.train(TASK, tmp_path_factory.mktemp("ensemble") / "run", checkpoint_every=4)


def errors_of(model: nn.Module) -> Tensor:
    """||p - onehot|| of every example."""
    with torch.no_grad():
        return (model(POINTS).softmax(1) - F.one_hot(LABELS, CLASSES)).norm(dim=1)


@pytest.mark.parametrize("count", [2, 22, 23])
def test_halves_and_what_they_leave(count: int) -> None:
    changes = halves(count, 6, seed=3)
    weights = torch.stack([change.weights(count) for change in changes])
    assert set(weights.flatten().tolist()) == {0.0, 2.0}
    assert (weights[0::2] + weights[1::2]).eq(2).all(), "a half and its complement"
    assert (weights == 0).sum(0).eq(3).all(), "each example is out of every second"
    assert (weights[0::2] == 0).sum(1).eq(count // 2).all()
    assert changes[:2] == halves(count, 2, seed=3)
    if count > 2:
        assert len({change.ids for change in changes}) == 6
        assert changes != halves(count, 6, seed=4)


def test_the_replays_are_trainings_on_halves(run: hg.Run) -> None:
    """Against loops written out, each over the recorded ids without a half."""
    found = hg.mislabels(run, replays=4, seed=5, **QUIET)
    models = [trained_again(TASK, run, change.ids, 0.0, others=2.0) for change in halves(22, 4, seed=5)]
    expected = torch.stack([errors_of(model) for model in models]).mean(0)
    assert found.signal == "ensemble"
    assert_close(found.score - found.signals["late"], expected, {torch.float64: 1e-5})
    assert torch.equal(found.score, found.signals["ensemble"])
    plain = hg.mislabels(run, progress=False)
    assert torch.equal(found.suggested, plain.suggested)  # type: ignore[arg-type]
    assert "ensemble" not in plain.signals


class FromZero(nn.Module):
    """Logistic regression that starts at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(CLASSES, POINTS.shape[1], dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def test_one_step_of_logistic_regression(tmp_path: Path) -> None:
    """From zero every class has p = 1/3: W = lr/N sum of weight_i (onehot(y_i) - 1/3) x_i, whatever is left out."""
    points = POINTS.double()
    task = replace(
        TASK,
        model=FromZero,
        train=TensorDataset(points, LABELS),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=3.0),
        batch_size=22,
        epochs=1,
    )
    run = hg.train(task, tmp_path / "run", checkpoint_every=1)
    found = hg.mislabels(run, replays=2, **QUIET)
    target = F.one_hot(LABELS, CLASSES).double()

    def p(weights: Tensor) -> Tensor:
        return (points @ (3.0 / 22 * (weights[:, None] * (target - 1 / 3)).T @ points).T).softmax(1)

    errors = [(p(change.weights(22)) - target).norm(dim=1) for change in halves(22, 2, seed=0)]
    doubt = 1 - (p(torch.ones(22)) * target).sum(1)
    assert_close(found.score, doubt + (errors[0] + errors[1]) / 2, ORACLE)


def test_side_by_side_and_from_a_folder(run: hg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = hg.mislabels(run, replays=4, **QUIET).score
        assert torch.equal(hg.mislabels(run, replays=4, jobs=2, **QUIET).score, alone)
        hg.mislabels(run, replays=2, resume=tmp_path / "kept", **QUIET)
        done: list[int] = []
        asked = carrying.outcomes

        def watched(retrainer: Any, numbered: Any, **options: Any) -> Any:
            done.extend(k for k, _ in numbered)
            return asked(retrainer, numbered, **options)

        monkeypatch.setattr(carrying, "outcomes", watched)
        assert torch.equal(hg.mislabels(run, replays=4, resume=tmp_path / "kept", **QUIET).score, alone)
        assert done == [2, 3], "the first two were kept"
        with pytest.raises(hg.MismatchError, match=r"another question: its values differ"):
            hg.mislabels(run, replays=4, labels=LABELS.flip(0), resume=tmp_path / "kept", **QUIET)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("replays", [0, 3, -2])
def test_what_is_no_number_of_pairs_is_refused(run: hg.Run, replays: Any) -> None:
    with pytest.raises(hg.MismatchError, match=r"come in pairs.*even number"):
        hg.mislabels(run, replays=replays, **QUIET)


def test_without_labels_or_without_halves_it_is_refused(tmp_path: Path) -> None:
    def squared(model: nn.Module, batch: Any) -> Tensor:
        return (model(batch[0])[:, 0] - batch[1]).square()

    run = hg.train(replace(TASK, loss=squared, train=TensorDataset(POINTS, POINTS[:, 0])), tmp_path / "run")
    with pytest.raises(hg.UnsupportedError, match=r"compares labels, and there are none"):
        hg.mislabels(run, **QUIET)
    one = hg.train(replace(TASK, train=TensorDataset(POINTS[:1], LABELS[:1]), loss=losses), tmp_path / "one")
    with pytest.raises(hg.MismatchError, match="one example has no halves"):
        hg.mislabels(one, labels=[0], classes=[0, 1], **QUIET)


@pytest.mark.slow
def test_flipped_digits_are_found(tmp_path: Path) -> None:
    """A run of 400 digits, a tenth flipped: as good as el2n, or better."""
    task = digits(flipped=0.1, train_size=400, test_size=10, epochs=10)
    found = hg.mislabels(hg.train(task, tmp_path / "run", checkpoint_every=7), replays=4, **QUIET)
    assert task.flipped_ids is not None
    recalls = {n: precision_recall(x, task.flipped_ids, 40).recall for n, x in found.signals.items()}
    assert recalls["ensemble"] >= max(recalls["el2n"], 0.85)
