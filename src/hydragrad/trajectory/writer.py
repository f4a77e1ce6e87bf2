"""Writing a run to disk while it trains: one writer per folder, a consistent store after every flush."""

import os
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from hydragrad.errors import StoreError, message
from hydragrad.files import dumps, loads, sha256, write_atomically
from hydragrad.trajectory.format import JOURNAL, LOCK, MANIFEST, FileRef, encode_state, encode_steps
from hydragrad.trajectory.keeping import encode_batches
from hydragrad.trajectory.state import Manifest, State, StepRecord


@final
class StoreWriter:
    """Owns a run's folder while it is recorded.

    Order of writing: checkpoint 0, journal with its first line, manifest (from here on the run exists); then for each
    segment its steps, its checkpoint, and last the journal's line that makes them count.
    """

    def __init__(self, folder: Path, *, overwrite: bool) -> None:
        self.folder = folder
        if (folder / MANIFEST).exists() and not overwrite:
            raise StoreError(
                message(
                    f"{folder} already holds a recorded run",
                    expected="a new or empty folder",
                    remedy="record into another folder, or give overwrite=True to replace that run",
                )
            )
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = _lock(folder)
        self._previous = ""
        self.started = False
        self._written = 0

    def start(self, manifest: Manifest, state: State) -> None:
        """The first step is about to be taken: replace what was here by the new run."""
        (self.folder / MANIFEST).unlink(missing_ok=True)  # first: without it the old run is gone as a whole
        held = [path for kind in ("steps", "checkpoints", "batches") for path in self.folder.glob(f"{kind}/*")]
        for old in [self.folder / JOURNAL, *held]:
            if old.suffix in (".safetensors", ".jsonl", ".tmp"):
                old.unlink(missing_ok=True)
        described = (dumps(asdict(manifest)) + "\n").encode()
        self._previous = sha256(described)
        line = self._line({"start": 0, "stop": 0, "steps": None, "checkpoint": self._checkpoint(state)})
        write_atomically(self.folder / JOURNAL, line)
        write_atomically(self.folder / MANIFEST, described)
        self.started = True

    def flush(self, steps: list[StepRecord], state: State | None, batches: list[Any] | None = None) -> None:
        """Append a segment: ``steps``, the state after the last of them (None: it cannot be told apart), batches."""
        start, stop = steps[0].index, steps[-1].index + 1
        entry = {
            "start": start,
            "stop": stop,
            "steps": FileRef.write(self.folder, f"steps/{start:08d}.safetensors", encode_steps(steps)).to_dict(),
            "checkpoint": None if state is None else self._checkpoint(state),
        }
        if batches is not None:
            name = f"batches/{start:08d}.safetensors"
            entry["batches"] = FileRef.write(self.folder, name, encode_batches(batches)).to_dict()
        self._append(entry)
        self._written = stop

    def finish(self, *, complete: bool, reason: str, skipped: list[list[int]]) -> None:
        """The journal's last line: whether the block ended normally or why not, and batches after the last step."""
        entry = {"end": True, "complete": complete, "reason": reason, "stop": self._written, "skipped": skipped}
        self._append(entry)

    def close(self) -> None:
        """Give the folder free."""
        self._lock.unlink(missing_ok=True)

    def _checkpoint(self, state: State) -> dict[str, Any]:
        name = f"checkpoints/{state.step:08d}.safetensors"
        return FileRef.write(self.folder, name, encode_state(state)).to_dict()

    def _line(self, entry: dict[str, Any]) -> bytes:
        line = (dumps({**entry, "previous": self._previous}) + "\n").encode()
        self._previous = sha256(line)
        return line

    def _append(self, entry: dict[str, Any]) -> None:
        with open(self.folder / JOURNAL, "ab") as journal:
            journal.write(self._line(entry))
            journal.flush()
            os.fsync(journal.fileno())


def _lock(folder: Path) -> Path:
    """Take the folder for this process; a lock whose process is dead is taken over."""
    path = folder / LOCK
    for _ in range(2):
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            if _holder_is_alive(path):
                break
            path.unlink(missing_ok=True)
            continue
        os.write(handle, dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        os.close(handle)
        return path
    raise StoreError(
        message(
            f"{folder} is being recorded into by another recorder",
            got=f"lock {path}: {path.read_text() if path.exists() else 'taken'}",
            remedy="record into another folder; if no recorder runs, delete the lock file",
        )
    )


def _holder_is_alive(path: Path) -> bool:
    try:
        holder = loads(path.read_bytes())
        if holder["host"] != socket.gethostname():
            return True
        os.kill(holder["pid"], 0)
    except (ProcessLookupError, FileNotFoundError):
        return False
    except (ValueError, KeyError):
        return False  # killed between creating and filling the lock
    except PermissionError:
        return True
    return True
