"""Probabilities read from losses: the model's, also where the loss weighs the classes; else that is said."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hydragrad as hg
from hydragrad.hypergradient.queries import Columns
from hydragrad.report.subject import Subject
from hydragrad.signals.ensembles import halves
from hydragrad.signals.probabilities import Scale
from tests.retraining.by_hand import trained_again
from tests.tasks.small import make_task
from tests.tolerances import assert_close
from tests.trajectory.loops import CLASSES, make_data

POINTS, LABELS = make_data().tensors
WEIGHTS = torch.tensor([1.0, 6.0, 0.4])
QUIET: dict[str, Any] = {"progress": False}


def entropies(**options: Any) -> Callable[[nn.Module, Any], Tensor]:
    return lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], reduction="none", **options)


def recorded(folder: Path, loss: Callable[[nn.Module, Any], Tensor]) -> tuple[hg.Task, hg.Run]:
    task = make_task(loss=loss)
    return task, hg.train(task, folder, checkpoint_every=4)


@pytest.mark.parametrize("weights", [WEIGHTS, torch.full((3,), 0.25), None])
def test_they_are_the_models_whatever_the_classes_weigh(weights: Tensor | None, tmp_path: Path) -> None:
    task, run = recorded(tmp_path / "run", entropies(weight=weights))
    found = hg.mislabels(run, **QUIET)
    each = []
    for step in (4, 8, 10):
        model = task.build()
        model.load_state_dict(run.trajectory.state(step).params)
        with torch.no_grad():
            each.append(model(POINTS).log_softmax(1))
    logs = torch.stack(each)
    p, target = logs.exp(), F.one_hot(LABELS, CLASSES)
    assert_close(found.score, (p - target).norm(dim=2).mean(0), {torch.float32: 1e-5})
    assert_close(found.signals["doubt"], 1 - (p * target).sum(2).mean(0), {torch.float32: 1e-5})
    assert torch.equal(found.suggested, logs.mean(0).argmax(1))  # type: ignore[arg-type]
    assert ("weighs the classes" in found.note) == (weights is not None)
    assert found.note in str(found)


def test_an_ensemble_takes_the_weights_out_too(tmp_path: Path) -> None:
    task, run = recorded(tmp_path / "run", entropies(weight=WEIGHTS))
    found = hg.mislabels(run, signal="ensemble", replays=2, seed=5, **QUIET)
    errors = []
    for change in halves(22, 2, seed=5):
        p = trained_again(task, run, change.ids, 0.0, others=2.0)(POINTS).softmax(1).detach()
        errors.append((p - F.one_hot(LABELS, CLASSES)).norm(dim=1))
    assert_close(found.score - found.signals["late"], torch.stack(errors).mean(0), {torch.float64: 1e-5})


def test_a_page_tells_the_models_probabilities(tmp_path: Path) -> None:
    task, run = recorded(tmp_path / "run", entropies(weight=WEIGHTS))
    scores = hg.attribute(run, task.test, check=False, compile=False, progress=False)
    said = Subject(run, scores, task.test, Columns.make(None, 4), None, None, None).said([0, 3])
    model = task.build()
    model.load_state_dict(run.trajectory.state(10).params)
    points, labels = task.test.tensors
    with torch.no_grad():
        p = model(points).softmax(1)
    for place, found in said.items():
        assert found.own == pytest.approx(float(p[place, labels[place]]), rel=1e-5)
        assert (found.predicted, found.confidence) == (int(p[place].argmax()), pytest.approx(float(p[place].max())))
    assert sorted(said) == [0, 3]


@pytest.mark.parametrize("options", [{"label_smoothing": 0.2}, {"label_smoothing": 0.2, "weight": WEIGHTS}])
def test_other_losses_are_said_to_be_other(options: dict[str, Any], tmp_path: Path) -> None:
    task, run = recorded(tmp_path / "run", entropies(**options))
    found = hg.mislabels(run, states=1, **QUIET)
    assert "the losses are not those of cross entropy" in found.note
    model = task.build()
    model.load_state_dict(run.trajectory.state(10).params)
    with torch.no_grad():
        tried = torch.stack([task.loss(model, (POINTS, torch.full_like(LABELS, c))) for c in range(CLASSES)], 1)
    p = torch.softmax(-tried, 1)
    assert_close(found.score, (p - F.one_hot(LABELS, CLASSES)).norm(dim=1), {torch.float32: 1e-5})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sharpness", [0.1, 1.0, 8.0])
def test_weights_are_found_where_they_matter(sharpness: float, dtype: torch.dtype) -> None:
    """Also of nearly untrained and of very sure models; what they predict is right even where they cannot be told."""
    for classes in (2, 10, 50):
        logits = sharpness * torch.randn(20 * classes, classes, dtype=torch.float64)
        weights = torch.exp(torch.randn(classes, dtype=torch.float64))
        losses = (-logits.log_softmax(1) * weights).to(dtype)
        scale = Scale.of(losses)
        assert scale.fits
        p = torch.softmax(-scale.unweighted(losses), 1).double()
        assert float((p - logits.softmax(1)).abs().max()) < 1e-2


def test_too_few_examples_and_odd_losses_are_not_fitted() -> None:
    logs = torch.randn(5, 3).log_softmax(1)
    assert Scale.of(-logs) == Scale()
    assert not Scale.of(-logs * WEIGHTS).fits
    assert not Scale.of(torch.full((30, 3), -1.0)).fits
    assert not Scale.of(torch.full((30, 3), torch.nan)).fits
    assert not Scale.of(torch.randn(30, 3).square()).fits


def test_what_only_looked_like_cross_entropy_is_seen_at_another_state(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, run = recorded(tmp_path / "run", entropies(label_smoothing=0.2))
    seen: list[Tensor] = []
    of = Scale.of

    def misled(losses: Tensor) -> Scale:
        seen.append(losses)
        return Scale() if len(seen) == 1 else of(losses)

    expected = hg.mislabels(run, **QUIET)
    monkeypatch.setattr(Scale, "of", staticmethod(misled))
    found = hg.mislabels(run, **QUIET)
    assert len(seen) == 2
    assert torch.equal(found.score, expected.score)
    assert found.note == expected.note
