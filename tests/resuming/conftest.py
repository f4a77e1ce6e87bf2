"""A run, pieces of a few queries, and a folder in which some are finished."""

from pathlib import Path
from typing import Any

import pytest

import hydragrad as hg
from hydragrad import attributing, planning
from hydragrad.hypergradient.choosing import Fixed
from tests.hypergradient.recorded import recipe_of, recorded
from tests.resuming.pieces import FIXED, JOURNAL, PROBLEM, asked, on_step


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return recorded(recipe_of(PROBLEM), tmp_path_factory.mktemp("resuming") / "run")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a long run would choose, here: with a folder or without one."""
    real = attributing.plan_sweep

    def plan_sweep(*args: Any, again: Fixed | None = None, **options: Any) -> planning.Plan:
        return real(*args, again=again or FIXED, **options)

    monkeypatch.setattr(attributing, "plan_sweep", plan_sweep)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step that is swept."""
    swept: list[int] = []
    on_step(monkeypatch, lambda: swept.append(1))
    return swept


@pytest.fixture(scope="module")
def begun(run: hg.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose first three pieces are finished."""
    folder = tmp_path_factory.mktemp("begun") / "pieces"
    real = attributing.plan_sweep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attributing, "plan_sweep", lambda *a, again=None, **o: real(*a, again=again or FIXED, **o))
        asked(run, folder)
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (folder / JOURNAL).write_bytes(b"".join(lines[:4]))
    return folder
