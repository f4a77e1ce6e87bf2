"""A run on small images, its scores, and what is known of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

import hydragrad as hg

N, M, SIDE, CLASSES = 40, 9, 6, 3


def loss(model: nn.Module, batch: Any) -> torch.Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def make(side: int = SIDE, train: int = N, test: int = M) -> hg.Task:
    """Images [1, side, side] whose brightness tells their label, mostly."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, CLASSES, (train + test,), generator=generator)
    images = torch.rand(train + test, 1, side, side, generator=generator) * 0.6
    images += 0.1 * labels[:, None, None, None]
    return hg.Task(
        "bright",
        model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(side * side, 8), nn.Tanh(), nn.Linear(8, CLASSES)),
        loss=loss,
        train=TensorDataset(images[:train], labels[:train]),
        test=TensorDataset(images[train:], labels[train:]),
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5),
        batch_size=10,
        epochs=3,
    )


@pytest.fixture(scope="package")
def task() -> hg.Task:
    return make()


@pytest.fixture(scope="package")
def run(task: hg.Task, tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return hg.train(task, tmp_path_factory.mktemp("report") / "run", checkpoint_every=4)


@pytest.fixture(scope="package")
def scores(task: hg.Task, run: hg.Run) -> hg.Attribution:
    return hg.attribute(run, task.test, compile=False, progress=False)


@pytest.fixture(scope="package")
def proof(task: hg.Task, run: hg.Run, scores: hg.Attribution) -> hg.Validation:
    return hg.validate(run, scores, task.test, n=5, progress=False)


@pytest.fixture(scope="package")
def suspects(run: hg.Run) -> hg.Suspects:
    return hg.mislabels(run, progress=False)


@pytest.fixture
def page(tmp_path: Path) -> Path:
    return tmp_path / "report.html"
