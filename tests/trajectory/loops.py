"""Small training loops to record, each written out as a user would write it."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from hydragrad.run import Run, load
from hydragrad.trajectory.recording import record

N, FEATURES, CLASSES = 22, 6, 3


def make_data(length: int = N, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Seeded points with seeded labels."""
    generator = torch.Generator().manual_seed(5)
    points = torch.randn(length, FEATURES, generator=generator).to(dtype)
    return TensorDataset(points, torch.randint(0, CLASSES, (length,), generator=generator))


def make_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """A seeded two-layer network; leaves the global random state alone."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, CLASSES)).to(dtype)


def losses(model: nn.Module, batch: Any) -> Tensor:
    """Per-example cross entropy, [b]."""
    points, labels = batch
    return F.cross_entropy(model(points), labels, reduction="none")


def train(
    model: nn.Module,
    optimizer: Optimizer,
    loader: Any,
    batches: Callable[[Any], Iterable[Any]] = iter,
    *,
    epochs: int = 2,
    stop_after: int | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """The plain loop: mean loss, one batch per step, an epoch cut short after ``stop_after`` batches."""
    for _ in range(epochs):
        for place, batch in enumerate(batches(loader)):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
            on_step()
            if place + 1 == stop_after:
                break


def sgd(model: nn.Module) -> Optimizer:
    """SGD with momentum."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def make_loader(data: Any = None) -> DataLoader:
    """Seeded, shuffled batches of 5."""
    return DataLoader(
        make_data() if data is None else data, 5, shuffle=True, generator=torch.Generator().manual_seed(2)
    )


def record_run(
    path: Path, model: nn.Module | None = None, optimizer: Optimizer | None = None, data: Any = None, **options: Any
) -> nn.Module:
    """Record the plain loop with SGD over ``data`` in shuffled batches of 5; returns the trained model."""
    model = make_model() if model is None else model
    optimizer = sgd(model) if optimizer is None else optimizer
    loader = make_loader(data)
    train_options = {key: options.pop(key) for key in ("epochs", "stop_after", "on_step") if key in options}
    with record(path, model, optimizer, checkpoint_every=options.pop("checkpoint_every", 4), **options) as recording:
        train(model, optimizer, loader, recording.batches, **train_options)
    return model


def bind(path: Path, **changes: Any) -> Run:
    """Load with the ordinary live objects, some changed."""
    return load(path, **{"model": make_model(), "loss": losses, "data": make_data(), **changes})


def assert_same_params(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Bit for bit."""
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def params_of(model: nn.Module) -> dict[str, Tensor]:
    """Detached parameters by name."""
    return {name: param.detach() for name, param in model.named_parameters()}
