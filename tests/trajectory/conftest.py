"""A recorded store, another one beside it, and a copy to alter."""

import shutil
from pathlib import Path

import pytest
import torch

from tests.trajectory.loops import make_model, record_run


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run to copy: 10 steps, checkpoints at 0, 4, 8, 10."""
    folder = tmp_path_factory.mktemp("mutations") / "run"
    record_run(folder)
    return folder


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same loop from other first weights: the same manifest, other content."""
    folder, model = tmp_path_factory.mktemp("mutations") / "other", make_model()
    with torch.no_grad():
        dict(model.named_parameters())["0.bias"].add_(1)
    record_run(folder, model)
    return folder


@pytest.fixture
def folder(recorded: Path, tmp_path: Path) -> Path:
    """A copy to alter."""
    return Path(shutil.copytree(recorded, tmp_path / "run"))
