"""A working folder with tasks, and a run trained there."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.commands.running import TASK, run
from tests.tasks.small import write_source


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a file of tasks."""
    write_source(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("COLUMNS", "120")
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("_hydragrad_task_"):
            del sys.modules[name]


@pytest.fixture
def trained(folder: Path) -> Path:
    run("train", TASK, "--out", "runs/small")
    return folder / "runs" / "small"
