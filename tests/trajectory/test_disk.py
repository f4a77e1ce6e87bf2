"""Disks that are full, folders that cannot be written, and two writers: said clearly, and nothing lost."""

import errno
import json
import os
import resource
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from hydragrad import locks, vectors
from hydragrad.attribution import Attribution
from hydragrad.diagnostics import Diagnostics
from hydragrad.errors import HydragradError, StoreError
from hydragrad.files import sha256, write_atomically
from hydragrad.journal import Journal, read_journal
from hydragrad.locks import Lock
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.store import Trajectory
from hydragrad.verification import verify
from tests.children import PATIENCE, ended, fork
from tests.faults import Disk, full
from tests.trajectory.loops import bind, losses, make_loader, make_model, record_run, sgd

FULL = r"cannot write .*Expected: a folder that can be written.*Got: No space left.*full disk.*Remedy: free some space"


def readable(folder: Path) -> int:
    """The steps of a run that opens and whose every step and checkpoint is as it was (-1: there is no run)."""
    if not (folder / "manifest.json").exists():
        return -1
    run = bind(folder)
    for step in run.trajectory.checkpoints:
        run.trajectory.state(step)
    assert verify(run).exact
    return run.num_steps


@pytest.mark.parametrize("for_good", [True, False], ids=["for good", "once"])
def test_a_disk_that_is_full_at_any_moment_of_a_recording(
    for_good: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, told_so = list[int](), list[bool]()
    for fails_at in range(100):
        folder = tmp_path / f"{fails_at}"
        with monkeypatch.context() as patch:
            disk = Disk(patch, lambda m, n=fails_at: m >= n if for_good else m == n, full)
            try:
                record_run(folder, epochs=1, checkpoint_every=2)
            except HydragradError as error:
                told = error
            else:
                assert disk.moments == fails_at  # past the last moment: nothing failed
                break
        with pytest.raises(StoreError, match=FULL):
            raise told
        lengths.append(readable(folder))
        assert not list(folder.rglob("*.tmp"))
        assert not (folder / "recording.lock").exists()
        if lengths[-1] >= 0 and not for_good:  # space came back in time to say why it ended
            reason = Trajectory(folder).reason
            told_so.append("No space left" in reason)
            assert told_so[-1] or "disk was full" in reason
    assert len(lengths) > 30
    assert set(lengths) >= {-1, 0, 2, 4} if for_good else {-1, 5}, lengths
    assert all(told_so[:-2])  # the last line is half written, then synchronised: there it cannot be said
    assert not for_good or lengths == sorted(lengths)  # up to the last flush


def test_a_loop_that_goes_on_after_the_disk_was_full_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Disk(monkeypatch, lambda moment: 12 <= moment < 20 and moment % 3 == 0, full)
    refusals, model, loader = 0, make_model(), make_loader()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer, checkpoint_every=1) as recording:
        for _ in range(2):
            for batch in recording.batches(loader):
                optimizer.zero_grad()
                losses(model, batch).mean().backward()
                try:
                    optimizer.step()
                except StoreError:
                    refusals += 1
    assert refusals == 3
    assert readable(tmp_path / "run") == 10
    assert Trajectory(tmp_path / "run").complete


def test_a_run_that_cannot_be_replaced_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_run(tmp_path / "run", epochs=1)
    kept, lengths = {p.name: p.read_bytes() for p in (tmp_path / "run").rglob("*.*") if p.is_file()}, []
    fails_at = 0
    for fails_at in range(100):
        folder = Path(shutil.copytree(tmp_path / "run", tmp_path / f"{fails_at}"))
        with monkeypatch.context() as patch:
            Disk(patch, lambda m, n=fails_at: m >= n, full)
            try:
                record_run(folder, epochs=2, overwrite=True, checkpoint_every=2)
            except StoreError as error:
                told = str(error)
            else:
                break
        assert "No space left" in told
        if (now := readable(folder)) == 5 and not lengths:
            assert {p.name: p.read_bytes() for p in folder.rglob("*.*") if p.is_file()} == kept
        else:
            lengths.append(now)
    assert fails_at - len(lengths) >= 7  # the old run, as long as the new one needs space to come to be
    assert lengths[-1] >= 8


def test_files_that_may_not_grow(tmp_path: Path) -> None:
    """The system's own refusal, halfway through a file."""

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, 12_000))  # the journal alone comes to be longer
        with pytest.raises(StoreError, match=r"cannot write .*File too large"):
            record_run(tmp_path / "run", epochs=12, checkpoint_every=1)

    assert ended(fork(work)) == 0
    assert 0 < readable(tmp_path / "run") < 60


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("may not mount a file system here")
    yield place
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no mount")
def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    with pytest.raises(StoreError, match=FULL):
        record_run(small_disk / "run", epochs=10, checkpoint_every=1)
    assert 0 < readable(small_disk / "run") < 50
    assert not Trajectory(small_disk / "run").complete


def attribution(value: float) -> Attribution:
    about = Diagnostics("exact", 1.0, 0.0, 1.0, 0.0, 1.0, "plan")
    return Attribution(torch.full((300, 4), value), torch.arange(300), torch.arange(4), "exact", about)


def test_scores_saved_to_a_full_disk_leave_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, failed = attribution(1.0).save(tmp_path / "scores"), 0
    for fails_at in range(10):
        with monkeypatch.context() as patch:
            Disk(patch, lambda m, n=fails_at: m == n, full)
            try:
                attribution(2.0).save(path)
            except StoreError as error:
                assert "scores" in str(error)  # noqa: PT017
                failed += 1
            else:
                break
        assert [p.name for p in tmp_path.iterdir()] == ["scores"]
        assert torch.equal(Attribution.load(path).values, attribution(1.0).values)
    assert failed >= 3
    assert torch.equal(Attribution.load(path).values, attribution(2.0).values)


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="space cannot be reserved here")
def test_vectors_on_a_full_disk_are_refused_before_the_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_run(tmp_path / "run", epochs=1)
    run = bind(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", lambda *_: full())
        patch.setattr(vectors, "forward_sweep", lambda *_: pytest.fail("the sweep began"))
        with pytest.raises(StoreError, match=FULL):
            vectors.hypergradients(run, [0], path=tmp_path / "kept", progress=False)
    assert not list((tmp_path / "kept").iterdir())
    expected = vectors.hypergradients(run, [0], progress=False).vectors
    kept = vectors.hypergradients(run, [0], path=tmp_path / "kept", progress=False).vectors
    torch.testing.assert_close(kept, expected)
    assert (tmp_path / "kept" / "vectors.bin").stat().st_blocks > 0


def test_folders_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("kept")
    for folder in (tmp_path / "file", tmp_path / "file" / "run", tmp_path / ("x" * 300)):
        with pytest.raises(StoreError, match=r"cannot write .*a file where a folder should be"):
            record_run(folder)
        with pytest.raises(StoreError, match=r"cannot write "):
            attribution(1.0).save(folder / "scores")
        with pytest.raises(StoreError, match=r"no recorded run in "):
            Trajectory(folder)
    assert (tmp_path / "file").read_text() == "kept"


def test_a_folder_without_permission(tmp_path: Path) -> None:
    record_run(tmp_path / "run", epochs=1)
    for path in (tmp_path / "run", tmp_path):
        path.chmod(0o500)
    try:
        if os.access(tmp_path, os.W_OK):
            pytest.skip("the administrator may write anywhere")
        with pytest.raises(StoreError, match=r"cannot write .*Permission denied"):
            record_run(tmp_path / "new")
        with pytest.raises(StoreError, match=r"cannot write .*Permission denied"):
            record_run(tmp_path / "run", overwrite=True)
        assert readable(tmp_path / "run") == 5
    finally:
        for path in (tmp_path, tmp_path / "run"):
            path.chmod(0o700)


def test_a_file_without_permission_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record_run(tmp_path / "run", epochs=1)

    def denied(path: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "read_bytes", denied)
    with pytest.raises(StoreError, match=r"manifest\.json cannot be read.*Permission denied"):
        Trajectory(tmp_path / "run")


def test_two_processes_do_not_record_into_one_folder(tmp_path: Path) -> None:
    folder, go = tmp_path / "run", tmp_path / "go"

    def work() -> None:
        def wait() -> None:
            (tmp_path / "started").touch()
            while not go.exists():
                time.sleep(0.002)

        record_run(folder, epochs=1, checkpoint_every=1, on_step=wait)

    child = fork(work)
    while not (tmp_path / "started").exists():
        time.sleep(0.002)
    for overwrite in (False, True):
        with pytest.raises(StoreError, match=rf"recorded into by another.*{child}.*Remedy: use another folder"):
            record_run(folder, overwrite=overwrite)
    go.touch()
    assert ended(child) == 0
    assert readable(folder) == 5
    assert Trajectory(folder).complete
    with pytest.raises(StoreError, match=r"already holds a recorded run.*another folder, or give overwrite=True"):
        record_run(folder)
    assert readable(folder) == 5
    assert not (folder / "recording.lock").exists()


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"pid":"x","host":"H"}', '{"pid":1e999}', "\0" * 9])
def test_a_lock_that_names_nobody_is_taken_over_once_it_is_old(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "_FILLING", 0.1)
    path, began = tmp_path / "lock", time.monotonic()
    path.write_text(content.replace("H", socket.gethostname()))
    lock = Lock(path, "written")
    assert time.monotonic() - began > 0.05  # its holder may have been about to fill it
    assert json.loads(path.read_text())["pid"] == os.getpid()
    lock.free()
    assert not path.exists()


def test_a_lock_that_is_filled_in_time_is_heeded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "_FILLING", PATIENCE)
    path = tmp_path / "lock"
    path.touch()

    def work() -> None:
        time.sleep(0.1)
        path.write_text(json.dumps({"pid": os.getppid(), "host": socket.gethostname()}))

    child = fork(work)
    with pytest.raises(StoreError, match=rf"is being written.*{os.getpid()}"):
        Lock(path, "written")
    assert ended(child) == 0


def test_a_file_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")
    for fails_at in range(3):
        with monkeypatch.context() as patch:
            Disk(patch, lambda m, n=fails_at: m == n, full)
            with pytest.raises(StoreError, match=r"cannot write .*file.*No space left"):
                write_atomically(path, b"new and longer")
        assert path.read_bytes() == b"old"
    write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"new and longer"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_journal_goes_on_behind_its_last_whole_line_however_long_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    Journal(path, sha256(b"")).append({"line": 1})
    path.write_bytes(path.read_bytes() + b"x" * 5000)
    entries, written = read_journal(path, sha256(b""), "nothing")
    Journal.after(path, written).append({"line": 2})
    entries, _ = read_journal(path, sha256(b""), "nothing")
    assert entries == [{"line": 1}, {"line": 2}]
    assert path.read_bytes().count(b"x") == 0
