"""What the tests of resumed attributions ask, and how they look at the folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

import hydragrad as hg
from hydragrad import attributing
from hydragrad.hypergradient.choosing import Fixed
from tests.zoo import case

PROBLEM = case("mlp_tanh")
QUERIES = [*PROBLEM.queries, *PROBLEM.samples[:7]]  # 11
FIXED = Fixed("traced:reverse-over-reverse", 2, 3, 2)  # pieces of 3, 3, 3, 2 queries
STEPS = 7
JOURNAL = "sweep.jsonl"


def asked(run: hg.Run, folder: Path | None, **options: Any) -> hg.Attribution:
    return hg.attribute(run, QUERIES, **{"check": False, "progress": False, "resume": folder, **options})


def on_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let ``act`` happen at every step of every sweep."""
    real = attributing.Watch.__call__

    def watch(self: Any, *args: Any) -> None:
        act()
        real(self, *args)

    monkeypatch.setattr(attributing.Watch, "__call__", watch)


def measured(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])[:, 0]


def changed(model: nn.Module, batch: Any) -> Tensor:
    return 1.01 * model(batch[0])[:, 0]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
