"""States of a stretch on disk while a sweep needs them: in a folder that goes with it, or is found dead later."""

import contextlib
import os
import shutil
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import final

from hydragrad.errors import StoreError
from hydragrad.files import sha256, writing
from hydragrad.journal import FileRef
from hydragrad.locks import Lock
from hydragrad.trajectory.format import decode_state, encode_state
from hydragrad.trajectory.state import State

FOLDER, _LOCK = "spilled", "sweep.lock"
_MAKING = 60.0
"""Seconds after which a folder without a lock is a dead sweep's: the lock is made right after the folder."""


@final
class Spill:
    """A folder below ``home`` for states by step; a context manager that removes it, and those of dead sweeps.

    Raises StoreError: a full disk, a folder that cannot be written, a state that is not as it was written.
    """

    def __init__(self, home: Path) -> None:
        self.folder = home / FOLDER / f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._held: dict[int, FileRef] = {}
        self._lock: Lock | None = None

    def __enter__(self) -> "Spill":
        remove_stale(self.folder.parent)
        self._lock = Lock(self.folder / _LOCK, "used by another sweep")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._lock is not None
        self._lock.free()
        _remove(self.folder)

    def write(self, state: State) -> None:
        """Keep a state. Not synchronised: what a crash of the machine loses, nobody asks for afterwards."""
        data = encode_state(state)
        ref = FileRef(f"states/{state.step:08d}.safetensors", len(data), sha256(data))
        path = self.folder / ref.name
        temporary = path.with_suffix(".tmp")
        with writing(path):
            path.parent.mkdir(exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        self._held[state.step] = ref

    def take(self, step: int) -> State:
        """The state before ``step``, which is not kept any longer."""
        ref = self._held.pop(step)
        path = self.folder / ref.name
        state = decode_state(path, ref.read(self.folder))
        path.unlink(missing_ok=True)
        return state


def remove_stale(parent: Path) -> None:
    """Remove the folders of sweeps that were killed."""
    for folder in sorted(parent.glob("*-*")):
        try:
            if not (folder / _LOCK).exists() and time.time() - folder.stat().st_mtime < _MAKING:
                continue
            Lock(folder / _LOCK, "used by another sweep").free()
        except (StoreError, FileNotFoundError):  # a living sweep's, or gone meanwhile
            continue
        _remove(folder)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with contextlib.suppress(OSError):
        folder.parent.rmdir()  # if it was the last one
