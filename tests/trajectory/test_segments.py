"""Segments are written beside the training: in order, none lost, none under way where processes are forked."""

import os
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from hydragrad.errors import StoreError
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.store import Trajectory
from hydragrad.verification import verify
from tests.faults import Disk, full
from tests.trajectory.loops import (
    assert_same_params,
    bind,
    losses,
    make_data,
    make_loader,
    make_model,
    params_of,
    record_run,
    sgd,
)


def writers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "hydragrad-writer"]


def test_the_training_goes_on_while_a_segment_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, rename = threading.Event(), os.replace

    def waiting(source: str, target: str) -> None:
        if threading.current_thread() is not threading.main_thread():
            assert go.wait(20)
            time.sleep(0.02)
        rename(source, target)

    model, loader, lines = make_model(), make_loader(), []
    optimizer, journal = sgd(model), tmp_path / "run" / "journal.jsonl"
    monkeypatch.setattr(os, "replace", waiting)
    with record(tmp_path / "run", model, optimizer, checkpoint_every=2) as recording:
        for _ in range(2):
            for place, batch in enumerate(recording.batches(loader)):
                if place == 0:
                    assert not writers()  # a loader may fork here
                optimizer.zero_grad()
                losses(model, batch).mean().backward()
                optimizer.step()
                lines.append(len(journal.read_bytes().splitlines()))
                if place == 2:  # the third step was taken while the first two were not written yet
                    assert writers()
                    go.set()
    assert lines[:3] == [1, 1, 1]
    assert not writers()
    run = bind(tmp_path / "run")
    assert run.trajectory.checkpoints == (0, 2, 4, 6, 8, 10)
    assert verify(run).exact
    assert_same_params(run.replay().params, params_of(model))


@pytest.mark.parametrize("keep_batches", [False, True])
def test_what_could_not_be_written_is_written_with_what_follows(
    keep_batches: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop is told at the checkpoint after, whose segment holds the steps of both."""
    steps, told = [], list[tuple[int, str]]()
    Disk(monkeypatch, lambda _: bool(writers()) and len(steps) == 2, full)
    model, loader = make_model(), make_loader()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer, checkpoint_every=2, keep_batches=keep_batches) as recording:
        for _ in range(2):
            for batch in recording.batches(loader):
                optimizer.zero_grad()
                losses(model, batch).mean().backward()
                steps.append(batch)
                try:
                    optimizer.step()
                except StoreError as error:
                    told.append((len(steps), str(error)))
                for writer in writers():
                    writer.join()
    assert [count for count, _ in told] == [4]
    assert "No space left" in told[0][1]
    gone = TensorDataset(*(torch.zeros_like(column) for column in make_data().tensors))
    run = bind(tmp_path / "run", data=gone if keep_batches else make_data())
    assert run.trajectory.complete
    assert run.trajectory.checkpoints == (0, 4, 6, 8, 10)
    assert verify(run).exact
    assert_same_params(run.replay().params, params_of(model))


def test_a_failure_of_the_last_segment_is_told_at_the_end_and_nothing_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        Disk(patch, lambda _: bool(writers()), full)
        with pytest.raises(StoreError, match="No space left"):
            record_run(tmp_path / "run", epochs=1, checkpoint_every=5)
    trajectory = Trajectory(tmp_path / "run")
    assert (len(trajectory), trajectory.checkpoints) == (5, (0, 5))
    assert "No space left" in trajectory.reason
    assert verify(bind(tmp_path / "run")).exact
