"""Runs on each device that is here: replayed bit for bit, and differentiated as retraining there says."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from hydragrad.attributing import attribute
from hydragrad.run import load
from hydragrad.trajectory.recording import record
from hydragrad.verification import verify
from tests.tolerances import FINITE_DIFFERENCE, assert_close
from tests.trajectory.loops import CLASSES, FEATURES, N, losses, make_data, make_loader

STEP = 1e-5
DEVICES = [
    pytest.param(name, marks=pytest.mark.skipif(missing, reason="no such device here"))
    for name, missing in (("cpu", False), ("cuda", not torch.cuda.is_available()))
]


def network(device: str, dtype: torch.dtype) -> nn.Sequential:
    """Draws on its device, and has running statistics there."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Dropout(0.3), nn.Linear(5, CLASSES)
        return nn.Sequential(*layers).to(device, dtype)


def there(model: nn.Module, batch: Any) -> Tensor:
    """The batch comes from the CPU."""
    device = next(model.parameters()).device
    return losses(model, [part.to(device) for part in batch])


def trained(path: Path, device: str, data: Dataset, dtype: torch.dtype, cast: torch.dtype | None = None) -> None:
    """Two passes with Adam, clipped; under autocast with a scaler where ``cast`` is given."""
    model = network(device, dtype)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    scaler = torch.amp.GradScaler(device, init_scale=64.0, enabled=cast is not None)
    with record(path, model, optimizer, checkpoint_every=4, scaler=scaler) as recording:
        for _ in range(2):
            for batch in recording.batches(make_loader(data)):
                optimizer.zero_grad()
                with torch.autocast(device, dtype=cast, enabled=cast is not None):
                    loss = there(model, batch).mean()
                scaler.scale(loss).backward()
                scaler.unscale_(optimizer)
                recording.clip_grad_norm_(model.parameters(), 0.5)
                scaler.step(optimizer)
                scaler.update()


@pytest.mark.parametrize("device", DEVICES)
def test_scores_of_a_run_are_what_retraining_there_gives(device: str, tmp_path: Path) -> None:
    data = make_data(dtype=torch.float64)
    trained(tmp_path / "run", device, data, torch.float64)
    run = load(tmp_path / "run", model=network(device, torch.float64), loss=there, data=data)
    assert all(set(draw or ()) == {"torch" if device == "cpu" else device} for step in run.steps for draw in step.draws)
    assert verify(run).exact
    queries = [data[i] for i in range(3)]
    scores = attribute(run, queries, measurement=there, check=False).values
    direction = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = []
    for sign in (1, -1):
        state, model = run.replay(weights=1 + sign * STEP * direction), network(device, torch.float64)
        model.load_state_dict({**state.params, **state.buffers})
        ends.append(torch.cat([there(model.eval(), [part[None] for part in query]) for query in queries]).detach())
    assert_close(direction @ scores.cpu(), ((ends[1] - ends[0]) / (2 * STEP)).cpu(), FINITE_DIFFERENCE)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_mixed_precision_is_replayed_bit_for_bit(device: str, cast: torch.dtype, tmp_path: Path) -> None:
    trained(tmp_path / "run", device, make_data(), torch.float32, cast)
    run = load(tmp_path / "run", model=network(device, torch.float32), loss=there, data=make_data())
    assert run.half_precision is cast
    found = verify(run)
    assert found.exact, found
    assert len(run.steps) > 5
