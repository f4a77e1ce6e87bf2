"""Recordings that are killed: whatever the moment, the store opens, says how far it got, and replays bit for bit."""

import contextlib
import os
import random
import time
from pathlib import Path

import pytest

from hydragrad.errors import StoreError
from hydragrad.run import Run
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.store import Trajectory
from hydragrad.verification import verify
from tests.children import PATIENCE, ended, fork, kill, until_killed
from tests.faults import Disk
from tests.trajectory.loops import assert_same_params, bind, make_model, record_run, sgd

EPOCHS, STEPS, EVERY = 30, 150, 3


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("killed") / "whole"
    record_run(folder, epochs=EPOCHS, checkpoint_every=EVERY)
    return bind(folder)


def wait_for_lines(folder: Path, count: int) -> None:
    """Until the run's journal has that many lines, however fast the machine is."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        with contextlib.suppress(FileNotFoundError):
            if (folder / "manifest.json").exists() and (folder / "journal.jsonl").read_bytes().count(b"\n") >= count:
                return
        time.sleep(0.0005)


def survives(folder: Path, uninterrupted: Run, *, replay: bool, last: int = STEPS) -> int:
    """Check what a killed recording left; how many steps it has (-1: the run was not there yet)."""
    try:
        run = bind(folder)
    except StoreError as error:
        if "no recorded run" not in str(error) or "before its first optimizer step" not in str(error):
            raise
        return -1
    if run.trajectory.complete:  # between the last line's writing and its being synchronised
        assert run.num_steps == last
    else:
        assert "killed" in run.trajectory.reason
    assert run.num_steps % EVERY == 0 or run.num_steps == last
    assert run.trajectory.checkpoints == tuple(sorted({*range(0, run.num_steps + 1, EVERY), run.num_steps}))
    end = run.trajectory.state(run.num_steps)
    assert_same_params(end.params, uninterrupted.replay(until=run.num_steps).params)
    if replay:
        found = verify(run)
        assert found.exact, found
        assert any("killed" in reason and f"{run.num_steps} steps" in reason for reason in found.reasons)
        assert_same_params(run.replay().params, end.params)
    return run.num_steps


def test_recordings_killed_at_fifty_random_moments(tmp_path: Path, uninterrupted: Run) -> None:
    chooser, lengths = random.Random(0), []
    for attempt in range(50):
        folder = tmp_path / f"{attempt}"
        slow = until_killed(0.0005, STEPS - 1)
        child = fork(
            lambda folder=folder, slow=slow: record_run(folder, epochs=EPOCHS, checkpoint_every=EVERY, on_step=slow)
        )
        if attempt % 10:  # every tenth is killed from its very beginning on
            wait_for_lines(folder, chooser.randrange(1, 30))
        time.sleep(chooser.uniform(0, 0.004 if attempt % 10 else 0.02))
        assert kill(child) == -9
        lengths.append(survives(folder, uninterrupted, replay=attempt % 5 == 1))
        assert lengths[-1] < STEPS
    assert len(set(lengths)) > 10, lengths  # killed at different moments indeed
    with record(tmp_path / "1", m := make_model(), sgd(m), overwrite=True):
        pass  # the dead recorder's lock is taken over


def test_a_recording_that_dies_at_any_single_moment_of_writing(
    tmp_path: Path, uninterrupted: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not by chance: half a file written, before it is synchronised, between a file and the line that names it."""
    lengths, folder = list[int](), tmp_path
    for dies_at in range(100):
        folder = tmp_path / f"{dies_at}"

        def work(folder: Path = folder, dies_at: int = dies_at) -> None:
            Disk(monkeypatch, lambda moment: moment == dies_at, lambda: os._exit(9))
            record_run(folder, epochs=2, checkpoint_every=EVERY)

        if (status := ended(fork(work))) == 0:
            break
        assert status == 9
        lengths.append(survives(folder, uninterrupted, replay=False, last=10))
    assert Trajectory(folder).complete
    assert len(lengths) > 35
    assert lengths == sorted(lengths)
    assert set(lengths) == {-1, 0, 3, 6, 9, 10}
