"""A task that trains in an instant, and the file that a user would write it in."""

from pathlib import Path

import torch
from torch.utils.data import TensorDataset

import hydragrad as hg
from tests.trajectory.loops import losses, make_data, make_model, sgd

SOURCE = """
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import hydragrad as hg

generator = torch.Generator().manual_seed(0)
points = torch.randn(30, 4, generator=generator)
labels = (points[:, 0] > 0).long() + (points[:, 1] > 0).long()
train_set, test_set = TensorDataset(points[:20], labels[:20]), TensorDataset(points[20:], labels[20:])


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make(hidden=3, lr=0.1, loss=loss):
    return hg.Task(
        "small",
        model=lambda: nn.Sequential(nn.Linear(4, hidden), nn.Tanh(), nn.Linear(hidden, 3)),
        loss=loss,
        train=train_set,
        test=test_set,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=lr),
        batch_size=8,
        epochs=2,
    )


small = make()
wider = make(hidden=5)
slower = make(lr=0.01)
narrow = replace(small, test=TensorDataset(points[20:, :3], labels[20:]))
texts = replace(small, test=["some", "words"] * 5)
ragged = replace(small, test=[(torch.zeros(size), 1) for size in range(10)])
squared = make(loss=lambda model, batch: loss(model, batch) ** 2)
three = replace(small, train=TensorDataset(points[:20, :3], labels[:20]))
doubles = replace(small, train=TensorDataset(points[:20].double(), labels[:20]))
beyond = replace(small, train=TensorDataset(points[:20], labels[:20] + 1))
nothing = replace(small, train=TensorDataset(points[:0], labels[:0]))
untested = replace(small, test=TensorDataset(points[:0], labels[:0]))
holes = replace(small, train=TensorDataset(points[:20] * torch.nan, labels[:20]))
classy = replace(small, optimizer=torch.optim.SGD)
eleven = 11


def instance():
    return replace(small, model=nn.Linear(4, 3))


def no_task():
    return "small"


def needs_more(size):
    return make(size)


def breaks():
    return 1 / 0
"""


def write_source(folder: Path, name: str = "small_tasks.py") -> Path:
    """The file of tasks, in ``folder``."""
    path = folder / name
    path.write_text(SOURCE, encoding="utf-8")
    return path


def make_task(**changes: object) -> hg.Task:
    """A task of the small loops' model and data."""
    points, labels = make_data().tensors
    options: dict[str, object] = {
        "model": make_small_model,
        "loss": losses,
        "train": make_data(),
        "test": TensorDataset(points[:4], labels[:4]),
        "optimizer": sgd,
        "batch_size": 5,
        "epochs": 2,
    }
    return hg.Task("small", **{**options, **changes})  # type: ignore[arg-type]


def make_small_model() -> torch.nn.Module:
    """Drawn from torch's own random state, as a user's model would be."""
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape))
    return model
