"""A replay that rounds otherwise than the recording: told as such, with what differs, where a run amplifies it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hydragrad as hg
from hydragrad.trajectory.surroundings import differing, surroundings


class Single(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * (4 / 3 * self.weight**3 - 1.5 * self.weight**2)


def logistic(model: nn.Module, batch: Tensor) -> Tensor:
    """Its descent with lr 1 is w <- 4 w (1 - w): chaotic, small differences double at every step."""
    return model(batch)


def recorded(folder: Path, loss: Any = logistic, spoilt: int | None = None, threads: int | None = None) -> hg.Run:
    data: Any = list(torch.ones(4, dtype=torch.float64))
    model = Single()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    with pytest.MonkeyPatch.context() as patch:
        if threads is not None:
            patch.setattr(torch, "get_num_threads", lambda: threads)
        with hg.record(folder, model, optimizer, reduction="mean") as recording:
            for place, batch in enumerate(b for _ in range(30) for b in recording.batches(DataLoader(data, 2))):
                optimizer.zero_grad()
                logistic(model, batch).mean().backward()
                if place == spoilt:
                    assert model.weight.grad is not None
                    model.weight.grad.mul_(0.9)
                optimizer.step()
    return hg.load(folder, model=Single(), loss=loss, data=data)


def nearly(model: nn.Module, batch: Tensor) -> Tensor:
    return logistic(model, batch) * (1 + 1e-12)


def test_rounding_that_grew_is_told_with_what_differs(tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    run = recorded(tmp_path / "run", nearly, threads=threads + 1)
    words = (
        rf"drifted away from the recorded run: at step \d+ .*off by \d.\de-12 \(relative\) at step 0, by .*"
        rf"recorded with {threads + 1} thread\(s\), replayed with {threads} thread\(s\).*chaotic.*set_num_threads"
    )
    with pytest.raises(hg.MismatchError, match=words):
        run.replay()
    assert f"recorded with {threads + 1} thread(s), replayed with {threads} thread(s)" in str(hg.verify(run))


def test_a_step_that_is_at_fault_alone_is_not_called_rounding(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", nearly, spoilt=5, threads=torch.get_num_threads() + 1)
    words = r"at step 5 is 1.11\d* times larger|at step 5 differs.*or recorded with \d+ thread\(s\), replayed with \d+"
    with pytest.raises(hg.MismatchError, match=words):
        run.replay()


def test_what_is_the_same_is_not_named(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run")
    manifest = run.trajectory.manifest
    assert surroundings().items() <= manifest.extra.items()
    assert differing(manifest, "cpu") == []
    assert differing(manifest, "cuda:0") == ["recorded on cpu, replayed on cuda:0"]
    del manifest.extra["threads"], manifest.extra["cpu"]  # as recorded before they were noted
    assert differing(manifest, "cpu") == []
    assert hg.verify(run).exact
