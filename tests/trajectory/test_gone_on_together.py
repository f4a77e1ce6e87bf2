"""Going on with a recording that also keeps batches, scales its gradients or thins its states."""

import os
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from hydragrad.errors import StoreError
from hydragrad.run import load
from hydragrad.trajectory.format import encode_state, encode_steps
from hydragrad.trajectory.keeping import encode_batches
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.resuming import Resumption
from hydragrad.trajectory.store import Trajectory
from hydragrad.verification import verify
from tests.children import ended, fork
from tests.trajectory.loops import losses, make_data, sgd
from tests.trajectory.test_augmentation import Noisy
from tests.trajectory.test_gone_on import StopHere, dropping, stopping

EPOCHS, EVERY, ROOM = 6, 3, 9_000
"""``ROOM`` bytes: for four of the eleven states."""


ALL = "kept, scaled and thinned"
KINDS: dict[str, dict[str, Any]] = {
    "kept": {"record": {"keep_batches": True}, "data": Noisy},
    "scaled": {"scaled": True},
    "thinned": {"record": {"checkpoint_bytes": ROOM}},
    ALL: {"record": {"keep_batches": True, "checkpoint_bytes": ROOM}, "data": Noisy, "scaled": True},
}


def large(model: nn.Module, batch: Any) -> Tensor:
    return 8 * losses(model, batch)


def loop(folder: Path, kind: str, on_step: Callable[[int], object] = lambda step: None) -> Resumption:
    """The same script every time: BatchNorm, dropout, shuffled batches; a scaler that overflows now and then."""
    options = KINDS[kind]
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    model = dropping()
    optimizer = sgd(model)
    # its gradients times 2^127 overflow until the scale is halved often enough; it is doubled again after three steps
    scaler = torch.amp.GradScaler("cpu", 2.0**127, growth_interval=3, enabled="scaled" in options)
    loader = DataLoader(options.get("data", make_data)(), 5, shuffle=True, generator=torch.Generator().manual_seed(2))
    given = {"checkpoint_every": EVERY, "resume": True, **options.get("record", {})}
    if "scaled" in options:
        given["scaler"] = scaler
    with record(folder, model, optimizer, **given) as recording:
        where = recording.restore()
        tried = 0
        for _ in range(where.epoch, EPOCHS):
            for batch in recording.batches(loader):
                optimizer.zero_grad()
                scaler.scale(large(model, batch).mean()).backward()
                scaler.step(optimizer)
                scaler.update()
                tried += 1
                on_step(tried)
                torch.rand(1)
    return where


def content(folder: Path) -> dict[str, Any]:
    """All that is recorded, in a form that compares."""
    run = Trajectory(folder)
    kept = [encode_batches(run.batches(step)) for step in range(len(run))] if run.keeps_batches else []
    return {
        "steps": [encode_steps([step]) for step in run.steps],
        "states": {step: encode_state(run.state(step)) for step in run.checkpoints},
        "kept": kept,
        "end": (run.complete, run.trailing),
    }


@pytest.fixture(scope="module", params=KINDS)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    loop(folder, request.param)
    return request.param, content(folder)


def test_the_runs_are_what_they_are_meant_to_be(whole: tuple[str, dict[str, Any]], tmp_path: Path) -> None:
    kind, expected = whole
    assert bool(expected["kept"]) == ("kept" in kind)
    assert (len(expected["states"]) <= 5) == ("thinned" in kind)
    loop(tmp_path / "run", kind)
    run = Trajectory(tmp_path / "run")
    assert any(step.passes for step in run.steps) == ("scaled" in kind)  # overflows, which moved the statistics
    assert content(tmp_path / "run") == expected


@pytest.mark.parametrize("at", [6, 8, 13, 20, 27])
def test_what_was_killed_anywhere_goes_on_and_ends_bit_for_bit_the_same(
    whole: tuple[str, dict[str, Any]], at: int, tmp_path: Path
) -> None:
    kind, expected = whole
    with pytest.raises(StopHere):
        loop(tmp_path / "stopped", kind, stopping(at))
    child = fork(lambda: loop(tmp_path / "killed", kind, lambda step: os._exit(9) if step == at else None))
    assert ended(child) == 9
    for folder in (tmp_path / "stopped", tmp_path / "killed"):
        assert not Trajectory(folder).complete
        loop(folder, kind)
        assert content(folder) == expected
        assert Trajectory(folder).resumptions
        run = load(folder, model=dropping(), loss=large, data=KINDS[kind].get("data", make_data)())
        assert verify(run).exact


def killed_once_written(folder: Path) -> None:
    """Die as soon as there is something to go on with: the writer beside the loop may not have come to it yet."""
    until = time.monotonic() + 30
    while time.monotonic() < until:
        with suppress(StoreError):  # a state that the writer thins out meanwhile
            if len(Trajectory(folder)):
                os._exit(9)
        time.sleep(0.01)


def test_killed_twice_with_all_three(tmp_path: Path) -> None:
    run = tmp_path / "run"
    loop(tmp_path / "whole", ALL)
    for at in (11, 9):
        last = lambda s, at=at: killed_once_written(run) if s == at else None  # noqa: E731
        assert ended(fork(lambda last=last: loop(run, ALL, last))) == 9
    loop(run, ALL)
    assert content(run) == content(tmp_path / "whole")
    # one at least: killed between dropping a state and the next one, it goes on from the first, and forgets the other
    assert Trajectory(run).resumptions
