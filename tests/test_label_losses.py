"""Every label tried on every example: what the model made of an input is used again only where nothing changes."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import TensorDataset, default_collate

import hydragrad as hg
from hydragrad.labels import with_label
from hydragrad.signals.trying import LabelLosses, with_label_everywhere
from tests.tasks.small import make_task
from tests.tolerances import UPDATE, assert_close
from tests.trajectory.loops import CLASSES, losses, make_data

TASK = make_task()
POINTS, LABELS = make_data().tensors
CALLS: Counter[str] = Counter()


class Counted(nn.Module):
    """Counts its calls, by the name of its kind."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(POINTS.shape[1], CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        CALLS["forward"] += 1
        return self.layer(x)


class OfLabels(nn.Module):
    """Its outputs depend on the labels too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.labels = nn.Linear(POINTS.shape[1], CLASSES), nn.Embedding(CLASSES, CLASSES)

    def forward(self, x: Tensor, *, labels: Tensor) -> Tensor:
        return self.layer(x) * self.labels(labels)


class Remembers(nn.Module):
    """Its outputs depend on what its loss told it before."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(POINTS.shape[1], CLASSES)
        self.told: Any = 0.0

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.told


def loss_of_labels(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0], labels=batch[1]), batch[1], reduction="none")


def loss_that_tells(model: nn.Module, batch: Any) -> Tensor:
    model.told = F.one_hot(batch[1], CLASSES).float()
    return losses(model, batch)


def loss_that_writes(model: nn.Module, batch: Any) -> Tensor:
    batch[0].mul_(0.5)
    return losses(model, batch)


def loss_that_writes_outputs(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).mul_(2.0), batch[1], reduction="none")


def loss_in_parts(model: nn.Module, batch: Any) -> Tensor:
    """Two calls of the model, the first alike for all labels."""
    first = model(batch[0])
    return F.cross_entropy(first + model(batch[0] + batch[1][:, None]), batch[1], reduction="none")


@pytest.mark.parametrize(
    ("make", "loss"),
    [
        (Counted, losses),
        (OfLabels, loss_of_labels),
        (Remembers, loss_that_tells),
        (Counted, loss_that_writes),
        (Counted, loss_that_writes_outputs),
        (Counted, loss_in_parts),
    ],
    ids=["plain", "labels", "state", "writes", "outputs", "parts"],
)
def test_losses_are_those_of_every_label_by_itself(
    make: Callable[[], nn.Module], loss: Callable[[nn.Module, Any], Tensor], tmp_path: Path
) -> None:
    task = replace(TASK, model=make, loss=loss)
    run = hg.train(task, tmp_path / "run")
    state = run.trajectory.state(10)
    own, tried = LabelLosses(run, range(CLASSES))(state)
    model = task.build().eval()
    model.load_state_dict(state.params)

    def alone(labels: Tensor) -> Tensor:
        with torch.no_grad():
            return loss(model, [POINTS.clone(), labels])

    assert_close(own, alone(LABELS), UPDATE)
    expected = torch.stack([alone(torch.full_like(LABELS, c)) for c in range(CLASSES)], 1)
    assert_close(tried, expected, UPDATE)


def test_inputs_that_come_to_depend_on_the_label_later_on(tmp_path: Path) -> None:
    """The first 64 examples, one batch, are the same to the model for all labels; the last six are not."""

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return losses(model, [batch[0] + batch[1][:, None] * (batch[0] > 5), batch[1]])

    x, labels = torch.randn(70, POINTS.shape[1]).clamp(-4, 4), torch.arange(70) % CLASSES
    x[64:] = 6.0
    task = replace(TASK, loss=loss, train=TensorDataset(x, labels))
    run = hg.train(task, tmp_path / "run")
    state = run.trajectory.state(28)
    _, tried = LabelLosses(run, range(CLASSES))(state)
    model = task.build().eval()
    model.load_state_dict(state.params)
    with torch.no_grad():
        expected = torch.stack([loss(model, [x, torch.full_like(labels, c)]) for c in range(CLASSES)], 1)
    assert_close(tried, expected, UPDATE)


def test_the_model_is_run_once_a_batch(tmp_path: Path) -> None:
    run = hg.train(replace(TASK, model=Counted), tmp_path / "run")
    of_all = LabelLosses(run, range(CLASSES))
    of_all(run.trajectory.state(10))
    CALLS.clear()
    of_all(run.trajectory.state(10))
    assert CALLS["forward"] == 1, "22 examples fit into one batch; three labels, and their own"


class Pair(NamedTuple):
    x: Tensor
    label: Any


@pytest.mark.parametrize(
    "samples",
    [
        [(POINTS[i], LABELS[i]) for i in range(4)],
        [[POINTS[i], int(LABELS[i])] for i in range(4)],
        [Pair(POINTS[i], LABELS[i : i + 1].int()) for i in range(4)],
        [({"x": POINTS[i]}, POINTS[i], bool(i % 2)) for i in range(4)],
    ],
)
def test_a_batch_is_relabelled_as_its_samples_are(samples: list[Any]) -> None:
    batch = default_collate(samples)
    made, expected = with_label_everywhere(batch, 4, 1), default_collate([with_label(s, 1) for s in samples])
    assert type(made) is type(expected)
    assert str(made) == str(expected)
    assert made[-1].dtype == expected[-1].dtype
    assert batch[-1].tolist() == default_collate(samples)[-1].tolist(), "the batch itself stays as it was"


def test_a_batch_without_labels_is_left_to_its_samples() -> None:
    for batch in (POINTS, [POINTS], [LABELS, POINTS[:, 0]], {"x": POINTS, "y": LABELS}, [POINTS, LABELS[:5]]):
        assert with_label_everywhere(batch, 22, 1) is None


def test_a_label_that_the_loss_does_not_know_is_refused(tmp_path: Path) -> None:
    run = hg.train(TASK, tmp_path / "run")
    with pytest.raises(hg.MismatchError, match=r"examples 0 to 21 have no loss with label 7.*classes="):
        hg.mislabels(run, classes=[0, 1, 2, 7], progress=False)


def test_other_data_and_other_samples(tmp_path: Path) -> None:
    """A collation and a relabelling of the user's own: sample by sample."""
    rows = [{"x": POINTS[i], "y": int(LABELS[i])} for i in range(22)]

    def collate(samples: list[Any]) -> list[Tensor]:
        return [torch.stack([s["x"] for s in samples]), torch.tensor([s["y"] for s in samples])]

    run = hg.train(replace(TASK, train=rows, collate_fn=collate), tmp_path / "run")
    plain = hg.train(TASK, tmp_path / "plain")
    state = run.trajectory.state(10)
    given = LabelLosses(run, range(CLASSES), lambda sample, label: {**sample, "y": label})(state)
    expected = LabelLosses(plain, range(CLASSES))(state)
    assert all(torch.equal(a, b) for a, b in zip(given, expected, strict=True))
    few = LabelLosses(plain, range(CLASSES), data=TensorDataset(POINTS[3:5], LABELS[3:5]))(state)
    assert_close(few[0], expected[0][3:5], UPDATE)
    assert_close(few[1], expected[1][3:5], UPDATE)
