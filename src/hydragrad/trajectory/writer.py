"""Writing a run to disk while it trains: one writer per folder, a consistent store after every flush."""

import contextlib
from dataclasses import asdict
from pathlib import Path
from typing import Any, final

from hydragrad.errors import StoreError, message
from hydragrad.files import dumps, make_durable, read_bytes, sha256, stage, write_atomically, writing
from hydragrad.journal import Entry, FileRef, Journal, read_journal, sealed
from hydragrad.locks import Lock
from hydragrad.trajectory.format import JOURNAL, KINDS, LOCK, MANIFEST, encode_state, encode_steps
from hydragrad.trajectory.keeping import encode_batches
from hydragrad.trajectory.points import Point, encode_point
from hydragrad.trajectory.state import Manifest, State, StepRecord
from hydragrad.trajectory.store import Trajectory
from hydragrad.trajectory.thinning import Thinning


@final
class StoreWriter:
    """Owns a run's folder while it is recorded.

    Order of writing: checkpoint 0, journal with its first line, manifest (from here on the run exists); then for each
    segment its steps, its checkpoint, and last the journal's line that makes them count. A state that is dropped (see
    Thinning) is first struck from the journal by a line of its own, then deleted.

    Only at the end of the run all of it is made to lie on the disk: done after every segment, that takes a sixth of
    what recording costs. A failure of power before may cost the last files, and the run ends before them (see store).
    """

    def __init__(self, folder: Path, thinning: Thinning, *, overwrite: bool, resume: bool = False) -> None:
        self.folder, self.thinning = folder, thinning
        self._lock = Lock(folder / LOCK, "recorded into by another recorder")
        if (folder / MANIFEST).exists() and not overwrite and not resume:
            self._lock.free()
            raise StoreError(
                message(
                    f"{folder} already holds a recorded run",
                    expected="a new or empty folder",
                    remedy="record into another folder, or give overwrite=True to replace that run "
                    "(resume=True: to go on with it)",
                )
            )
        self._journal: Journal | None = None
        self._written = 0
        self._in_memory: list[str] = []  # files that the system may not have written to the disk

    @property
    def started(self) -> bool:
        """Whether the run exists on disk."""
        return self._journal is not None

    def start(self, manifest: Manifest, state: State) -> None:
        """The first step is about to be taken: replace what was here by the new run.

        All that needs space is written beside what was here before that is touched: a full disk leaves it whole.
        """
        described = (dumps(asdict(manifest)) + "\n").encode()
        encoded = encode_state(state)
        first = FileRef(_checkpoint_name(state.step), len(encoded), sha256(encoded))
        line = sealed({"start": 0, "stop": 0, "steps": None, "checkpoint": first.to_dict()}, sha256(described))
        contents = {first.name: encoded, JOURNAL: line, MANIFEST: described}  # the manifest last: then the run exists
        staged: dict[Path, Path] = {}
        try:
            for name, content in contents.items():
                staged[self.folder / name] = stage(self.folder / name, content)
            with writing(self.folder):
                self._clear(set(staged.values()))
                for path, temporary in staged.items():
                    temporary.replace(path)
        except BaseException:
            for temporary in staged.values():
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
            raise
        self._journal = Journal(self.folder / JOURNAL, "")
        self._journal.wrote(line)
        self.thinning = self.thinning.holding(state.step, len(encoded))

    def _clear(self, kept: set[Path]) -> None:
        """Remove the run that was here, its manifest first: without that it is gone as a whole."""
        (self.folder / MANIFEST).unlink(missing_ok=True)
        held = [
            path for kind in ("steps", "checkpoints", "batches", "points") for path in self.folder.glob(f"{kind}/*")
        ]
        for old in [self.folder / JOURNAL, *held]:
            if old.suffix in (".safetensors", ".jsonl", ".tmp") and old not in kept:
                old.unlink(missing_ok=True)

    def flush(self, steps: list[StepRecord], state: State | None, batches: list[Any] | None = None) -> None:
        """Append a segment: ``steps``, the state after the last of them (None: not to be kept, or torn), batches."""
        start, stop = steps[0].index, steps[-1].index + 1
        files = {"steps": self._put(f"steps/{start:08d}.safetensors", encode_steps(steps))}
        if batches is not None:
            files["batches"] = self._put(f"batches/{start:08d}.safetensors", encode_batches(batches))
        self._append_with(state, {"start": start, "stop": stop, **files})
        self._written = stop

    def keep(self, state: State) -> None:
        """Store the state that the steps written last lead to."""
        self._append_with(state, {"start": self._written, "stop": self._written, "steps": None})

    def point(self, point: Point) -> None:
        """Store where the loop stood at a stored state."""
        ref = self._put(f"points/{point.step:08d}.safetensors", encode_point(point))
        self._append({"start": self._written, "stop": self._written, "steps": None, "checkpoint": None, "point": ref})

    def go_on(self, begun: Trajectory, step: int) -> int:
        """Go on before ``step`` with the run that is here; how many recorded steps after it are dropped.

        The journal is replaced as a whole: up to that step, and a line that says what was dropped.
        """
        path = self.folder / JOURNAL
        entries, written = read_journal(path, sha256(read_bytes(self.folder / MANIFEST)), MANIFEST)
        pairs = [*zip(entries, written.splitlines(keepends=True), strict=True)][: begun.lines]
        kept = [(entry, line) for entry, line in pairs if not entry.get("end") and entry["stop"] <= step]
        stored = set[int]()
        for entry, _ in kept:
            stored -= set(entry.get("dropped", ()))
            stored |= {entry["stop"]} if entry["checkpoint"] is not None else set()
        gone = sorted(stored - set(begun.checkpoints))  # dropped by a later line, and deleted
        about = {"start": step, "stop": step, "steps": None, "checkpoint": None, "resumed": len(begun) - step}
        line = sealed({**about, **({"dropped": gone} if gone else {})}, sha256(kept[-1][1]))
        content = b"".join([line for _, line in kept]) + line
        write_atomically(path, content)
        self._journal, self._written = Journal.after(path, content), step
        self._in_memory = [entry[kind]["name"] for entry, _ in kept for kind in KINDS if entry.get(kind)]
        sizes = {at: (self.folder / _checkpoint_name(at)).stat().st_size for at in stored - set(gone)}
        self.thinning = self.thinning.going_on(sizes)
        return len(begun) - step

    def _append_with(self, state: State | None, entry: dict[str, Any]) -> None:
        """Append a line with a state, if there is one, for which room is made first."""
        if state is None:
            self._append({**entry, "checkpoint": None})
            return
        encoded = encode_state(state)
        self._drop(self.thinning.with_room_for(state.step, len(encoded)))
        written = self._put(_checkpoint_name(state.step), encoded)
        try:
            self._append({**entry, "checkpoint": written})
        except StoreError:  # nothing says that it is there: it would lie beside the budget for ever
            with contextlib.suppress(OSError):
                (self.folder / written["name"]).unlink()
            raise
        self.thinning = self.thinning.holding(state.step, len(encoded))

    def _drop(self, thinned: Thinning) -> None:
        """Strike states from the journal by a line of its own, then delete them: a kill leaves at most their files."""
        dropped = sorted(set(self.thinning.kept) - set(thinned.kept))
        if dropped:
            at = {"start": self._written, "stop": self._written, "steps": None, "checkpoint": None}
            self._append({**at, "dropped": dropped}, durable=True)
            self.thinning = thinned
            with writing(self.folder):
                for step in dropped:
                    (self.folder / _checkpoint_name(step)).unlink(missing_ok=True)

    def finish(self, *, complete: bool, reason: str, skipped: list[list[int]], moved: bool) -> None:
        """The journal's last line: whether the block ended normally or why not, and batches after the last step.

        ``moved``: buffers of the model were changed after the last step, so that it is not the model of that step.
        """
        failed: StoreError | None = None
        try:
            for name in self._in_memory:
                if (self.folder / name).exists():  # else it was dropped
                    make_durable(self.folder / name)
        except StoreError as refused:
            complete, reason, failed = False, reason or f"{type(refused).__name__}: {refused}", refused
        entry = {"end": True, "complete": complete, "reason": reason, "stop": self._written, "skipped": skipped}
        entry |= {"moved": True} if moved else {}
        self._append(entry, durable=True)
        if failed is not None:
            raise failed

    def close(self) -> None:
        """Give the folder free."""
        self._lock.free()

    def _put(self, name: str, data: bytes) -> dict[str, Any]:
        """Write a file; what vouches for it in the journal."""
        written = FileRef.write(self.folder, name, data, durable=False)
        self._in_memory.append(name)
        return written.to_dict()

    def _append(self, entry: Entry, *, durable: bool = False) -> None:
        assert self._journal is not None
        self._journal.append(entry, durable=durable)


def _checkpoint_name(step: int) -> str:
    return f"checkpoints/{step:08d}.safetensors"
