"""The store: consistent whenever it is killed, refused by name when it was altered, nothing pickled."""

import json
import os
import pickle
import random
import shutil
import signal
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from hydragrad.errors import StoreError
from hydragrad.files import dumps, from_json, loads, to_json
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.store import Trajectory
from hydragrad.verification import verify
from tests.trajectory.loops import assert_same_params, bind, make_model, record_run, sgd


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run to copy: 10 steps, checkpoints at 0, 4, 8, 10."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    record_run(folder)
    return folder


@pytest.fixture
def run_folder(recorded: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(recorded, tmp_path / "run"))


FILES = ["steps/00000004.safetensors", "checkpoints/00000008.safetensors"]


def read_all(folder: Path) -> None:
    """Open, and read every checkpoint."""
    trajectory = Trajectory(folder)
    for step in trajectory.checkpoints:
        trajectory.state(step)


@pytest.mark.parametrize("name", FILES)
def test_missing_truncated_altered_and_swapped_files_are_refused_by_name(name: str, run_folder: Path) -> None:
    read_all(run_folder)
    path = run_folder / name
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(StoreError, match=f"{name} is missing"):
        Trajectory(run_folder)
    path.write_bytes(content[:-1])
    with pytest.raises(StoreError, match=f"{name} has the wrong size"):
        Trajectory(run_folder)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match=f"{name} was altered"):
        read_all(run_folder)
    other = name.replace("4.", "0.").replace("8.", "4.")
    shutil.copy(run_folder / other, path)
    with pytest.raises(StoreError, match=f"{name} (was altered|has the wrong size)"):
        read_all(run_folder)
    path.write_bytes(content)
    read_all(run_folder)


def test_altered_journal_manifest_and_version_are_refused(run_folder: Path) -> None:
    manifest, journal = run_folder / "manifest.json", run_folder / "journal.jsonl"
    described, lines = manifest.read_text(), journal.read_text()
    manifest.write_text(described.replace('"data_length":22', '"data_length":23'))
    with pytest.raises(StoreError, match=r"line 1 of .*journal.jsonl does not follow.*manifest"):
        Trajectory(run_folder)
    manifest.write_text(described.replace('"version":2', '"version":99'))
    with pytest.raises(StoreError, match=r"another format version.*version 1 or 2.*version 99"):
        Trajectory(run_folder)
    manifest.write_text(described[:40])
    with pytest.raises(StoreError, match=r"manifest.json cannot be read"):
        Trajectory(run_folder)
    manifest.write_text(described)
    journal.write_text(lines.replace('"stop":8', '"stop":7'))
    with pytest.raises(StoreError, match=r"line 4 of .* does not follow"):  # line 3 was edited, line 4 has its hash
        Trajectory(run_folder)
    kept = lines.splitlines(keepends=True)
    journal.write_text("".join([kept[0], *kept[2:]]))
    with pytest.raises(StoreError, match=r"line 2 of .* does not follow"):
        Trajectory(run_folder)
    journal.unlink()
    with pytest.raises(StoreError, match=r"journal.jsonl is missing"):
        Trajectory(run_folder)
    with pytest.raises(StoreError, match=r"no recorded run in .*nowhere.*manifest.json"):
        Trajectory(run_folder / "nowhere")


def test_a_journal_torn_anywhere_opens_as_a_prefix(run_folder: Path) -> None:
    journal = run_folder / "journal.jsonl"
    content = journal.read_bytes()
    ends = [place + 1 for place, byte in enumerate(content) if byte == ord("\n")]
    for length in [*range(ends[0], len(content), 97), *ends]:
        journal.write_bytes(content[:length])
        trajectory = Trajectory(run_folder)
        whole = sum(end <= length for end in ends)
        assert len(trajectory) == [0, 4, 8, 10, 10][whole - 1]
        assert trajectory.complete == (whole == 5)
        assert trajectory.complete or "killed" in trajectory.reason


def test_nothing_on_disk_is_pickled(recorded: Path) -> None:
    names = {path.relative_to(recorded).as_posix() for path in recorded.rglob("*") if path.is_file()}
    assert {name for name in names if "/" not in name} == {"manifest.json", "journal.jsonl"}  # the lock is gone
    for name in names:
        content = (recorded / name).read_bytes()
        if name.endswith(".safetensors"):
            with safe_open(recorded / name, framework="pt") as file:
                json.loads(file.metadata()["tables"])
        else:
            assert all(isinstance(json.loads(line), dict) for line in content.splitlines())
        with pytest.raises((pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError)):
            pickle.loads(content)


def test_values_that_json_lacks_come_back() -> None:
    value = {"a": (0.9, (1, None)), "b": float("inf"), "c": [True, "x", -float("inf")], "lr": 0.1 + 0.2}
    assert loads(dumps(value)) == value
    assert from_json(to_json(float("nan"))) != from_json(to_json(float("nan")))


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e-320])
def test_odd_hyperparameters_survive(value: float, tmp_path: Path) -> None:
    model = make_model()
    optimizer = sgd(model)
    optimizer.param_groups[0]["note"] = value
    record_run(tmp_path / "run", model, optimizer, epochs=1)
    assert repr(Trajectory(tmp_path / "run").steps[0].groups[0]["note"]) == repr(value)


def test_a_run_killed_at_any_moment_opens_as_a_prefix_that_replays(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    record_run(whole, epochs=40, checkpoint_every=3)
    uninterrupted = bind(whole)
    chooser, lengths = random.Random(0), []
    for attempt in range(12):
        folder = tmp_path / f"killed-{attempt}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none
            child = os.fork()
        if child == 0:  # records with the modules that are loaded already, then is killed without any clean-up
            try:
                torch.set_num_threads(1)
                record_run(folder, epochs=40, checkpoint_every=3, on_step=lambda: time.sleep(0.001))
            finally:
                os._exit(0)
        deadline = time.monotonic() + 20
        while not (folder / "manifest.json").exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chooser.uniform(0, 0.15))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        run = bind(folder)
        lengths.append(run.num_steps)
        assert not run.trajectory.complete
        assert run.num_steps % 3 == 0
        assert verify(run), verify(run)
        assert_same_params(run.replay().params, uninterrupted.replay(until=run.num_steps).params)
    assert len(set(lengths)) > 3, lengths  # killed at different moments indeed
    with record(tmp_path / "killed-0", m := make_model(), sgd(m), overwrite=True):
        pass  # the dead recorder's lock is taken over
