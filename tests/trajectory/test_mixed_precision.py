"""Loops in mixed precision: scalers that skip steps, autocast, what is refused."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import Optimizer

from hydragrad.errors import UnsupportedError
from hydragrad.trajectory.recording import Recording, record
from tests.trajectory.loops import (
    bind,
    losses,
    make_model,
    sgd,
)
from tests.trajectory.real import assert_exact, islanded, normed, plain, recorded


@pytest.mark.parametrize("clipped", [False, True])
@pytest.mark.parametrize(("initial", "factor"), [(2.0**40, 0.03), (3e-3, 0.7)], ids=["overflows", "underflows"])
def test_a_gradient_scaler(initial: float, factor: float, clipped: bool, tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler(
        "cpu", init_scale=initial, growth_interval=2, growth_factor=1.7, backoff_factor=factor
    )
    scales: list[float] = []

    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = losses(model, batch).mean()
        scaler.scale(loss).backward()
        if clipped:
            scaler.unscale_(optimizer)
            recording.clip_grad_norm_(model.parameters(), 0.3)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= before:
            scales.append(before)

    model = normed()
    recorded(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=0.5), step, 4, scaler=scaler)
    run = bind(tmp_path / "run", model=normed())
    assert_exact(run, model)
    assert [record.scale for record in run.steps] == scales
    overflowed = sum(len(record.skipped) for record in run.steps)
    assert len(run.steps) == 24 - overflowed
    assert (overflowed > 2) == (initial > 1)
    assert run.half_precision is torch.float16
    assert [len(record.passes) for record in run.steps] == [len(record.skipped) for record in run.steps]


def test_a_disabled_scaler_is_none_and_a_fused_optimizer_is_refused(tmp_path: Path) -> None:
    model = make_model()
    scaler = torch.amp.GradScaler("cpu", enabled=False)

    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        optimizer.zero_grad()
        scaler.scale(losses(model, batch).mean()).backward()
        scaler.step(optimizer)
        scaler.update()

    recorded(tmp_path / "run", model, sgd(model), step, scaler=scaler)
    assert bind(tmp_path / "run").steps[0].scale is None
    fused = torch.optim.Adam(model.parameters(), fused=True)
    with pytest.raises(UnsupportedError, match=r"fused optimizer.*fused=False"):
        record(tmp_path / "other", model, fused, scaler=torch.amp.GradScaler("cpu"))
    record(tmp_path / "other", model, fused, scaler=scaler)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_replayed_bit_for_bit(dtype: torch.dtype, backward: bool, tmp_path: Path) -> None:
    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype, enabled=place % 4 != 3):
            loss = losses(model, batch).mean()
            if backward:
                loss.backward()
        if not backward:
            loss.backward()
        optimizer.step()

    model = islanded()
    recorded(tmp_path / "run", model, sgd(model), step)
    run = bind(tmp_path / "run", model=islanded())
    assert_exact(run, model)
    assert run.half_precision is dtype
    casts = [record.autocast for record in run.steps]
    assert [cast is None for (cast,) in casts] == [place % 4 == 3 for place in range(12)]
    assert all(cast.backward == backward for (cast,) in casts if cast is not None)


def test_the_callers_autocast_does_not_reach_the_replay(tmp_path: Path) -> None:
    model = normed()
    recorded(tmp_path / "run", model, sgd(model), plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        run = bind(tmp_path / "run", model=normed())
        assert_exact(run, model)
    assert run.half_precision is None
