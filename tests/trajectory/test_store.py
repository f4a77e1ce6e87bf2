"""The store: consistent whenever it is killed, refused by name when it was altered, nothing pickled."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
from safetensors import safe_open

from hydragrad.errors import StoreError
from hydragrad.files import dumps, from_json, loads, to_json
from hydragrad.trajectory.format import VERSION
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
    manifest.write_text(described.replace(f'"version":{VERSION}', '"version":99'))
    with pytest.raises(StoreError, match=rf"another format version.*version {VERSION}.*version 99"):
        Trajectory(run_folder)
    manifest.write_text(described[:40])
    with pytest.raises(StoreError, match=r"manifest.json cannot be read"):
        Trajectory(run_folder)
    manifest.write_text(described)
    journal.write_text(lines.replace('"stop":8', '"stop":7'))
    with pytest.raises(StoreError, match=r"was altered in line 3"):
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


@pytest.mark.parametrize("remains", [None, b""], ids=["nothing", "an empty file"])
@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("steps/00000004.safetensors", 4),
        ("checkpoints/00000008.safetensors", 4),
        ("steps/00000008.safetensors", 8),
        ("checkpoints/00000010.safetensors", 8),
    ],
)
def test_a_run_that_ended_with_the_power_opens_before_what_was_lost(
    name: str, kept: int, remains: bytes | None, run_folder: Path
) -> None:
    """Files that the system had not written to the disk are empty or missing then; so is the journal's last line."""
    journal = run_folder / "journal.jsonl"
    whole, (*lines, _) = bind(run_folder), journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines))
    (run_folder / name).unlink()
    if remains is not None:
        (run_folder / name).write_bytes(remains)
    run = bind(run_folder)
    assert run.num_steps == kept
    assert run.trajectory.checkpoints == tuple(step for step in (0, 4, 8) if step <= kept)
    assert f"lost from step {kept} on, since {name} is not whole" in run.trajectory.reason
    assert not run.trajectory.complete
    found = verify(run)
    assert found.exact
    assert name in str(found)
    assert_same_params(run.replay().params, whole.replay(until=kept).params)


def test_the_first_state_is_never_lost(run_folder: Path) -> None:
    """It lay on the disk before the run existed: without it there is none."""
    journal = run_folder / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    (run_folder / "checkpoints/00000000.safetensors").unlink()
    with pytest.raises(StoreError, match=r"checkpoints/00000000.safetensors is missing"):
        Trajectory(run_folder)


def test_everything_lies_on_the_disk_before_the_end_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, synchronise, lying = tmp_path / "run", os.fsync, list[str]()

    def noted(handle: int) -> None:
        synchronise(handle)
        lying.append(Path(os.readlink(f"/proc/self/fd/{handle}")).name)

    monkeypatch.setattr(os, "fsync", noted)
    record_run(folder)
    written = {path.name for path in folder.rglob("*.safetensors")}
    assert written <= set(lying) | {"00000000.safetensors"}
    assert len([name for name in lying if name == "00000004.safetensors"]) == 2  # steps and the state
    assert lying[-1] == "journal.jsonl"


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
