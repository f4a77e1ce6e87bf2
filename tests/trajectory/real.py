"""Models with buffers and islands of full precision, and a loop whose body is chosen."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from hydragrad.run import Run
from hydragrad.trajectory.recording import Recording, record
from hydragrad.verification import verify
from tests.trajectory.loops import (
    CLASSES,
    FEATURES,
    assert_same_params,
    losses,
    make_data,
    params_of,
)


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return build()


def normed() -> nn.Module:
    """BatchNorm, and dropout before it, so that its statistics depend on both."""
    return seeded(
        lambda: nn.Sequential(
            nn.Linear(FEATURES, 5), nn.Dropout(0.2), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, CLASSES)
        )
    )


class Precise(nn.Linear):
    """A layer that stays in full precision whatever surrounds it; its backward pass does not."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            return super().forward(input.float())


def islanded() -> nn.Module:
    return nn.Sequential(normed(), nn.ReLU(), seeded(lambda: Precise(CLASSES, CLASSES)))


def assert_exact(run: Run, model: nn.Module) -> None:
    """Verified bit for bit, and its end is the trained model, buffers included."""
    found = verify(run)
    assert found.exact, found
    end = run.replay()
    assert_same_params(end.params, params_of(model))
    assert_same_params(end.buffers, dict(model.named_buffers()))


Step = Callable[[Recording, nn.Module, Optimizer, Any, int], None]


def recorded(path: Path, model: nn.Module, optimizer: Optimizer, step: Step, epochs: int = 2, **options: Any) -> None:
    """A loop whose body is ``step``."""
    loader = DataLoader(make_data(), 4, shuffle=True, generator=torch.Generator().manual_seed(2))
    with record(path, model, optimizer, checkpoint_every=3, **options) as recording:
        place = 0
        for _ in range(epochs):
            for batch in recording.batches(loader):
                step(recording, model, optimizer, batch, place)
                place += 1


def plain(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
    """The ordinary step."""
    optimizer.zero_grad()
    losses(model, batch).mean().backward()
    optimizer.step()
