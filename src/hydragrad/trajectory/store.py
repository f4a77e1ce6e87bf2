"""Reading a recorded run: opened from its folder, checked, never unpickled."""

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, final

from hydragrad.errors import MismatchError, StoreError, message
from hydragrad.files import loads, sha256
from hydragrad.trajectory.format import JOURNAL, MANIFEST, READABLE, FileRef, decode_state, decode_steps
from hydragrad.trajectory.keeping import decode_batches
from hydragrad.trajectory.state import Manifest, State, StepRecord


@final
class Trajectory:
    """A recorded run as it lies in a folder.

    ``steps``: what happened, step by step (as far as the run was flushed); ``checkpoints``: the steps t whose state
    is stored; ``complete``: whether the recorded block ended normally, else ``reason`` says why not.
    Raises StoreError for a missing, altered, truncated or swapped file, naming it.
    Example: ``Trajectory("runs/digits").state(0).params``.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest, described = _read_manifest(self.folder)
        entries = _read_journal(self.folder, sha256(described))
        last = entries[-1]
        self.complete: bool = bool(last.get("end") and last["complete"])
        self.reason: str = last["reason"] if last.get("end") else "the recording process was killed"
        self.trailing: list[list[int]] = last["skipped"] if last.get("end") else []
        """Ids of the batches after the last step."""
        self._states: dict[int, FileRef] = {}
        self._batches: dict[int, FileRef] = {}
        self._segment: tuple[int, list[Any]] = (-1, [])
        steps: list[StepRecord] = []
        for entry in entries:
            if entry.get("end"):
                continue
            if entry["checkpoint"] is not None:
                checkpoint = FileRef(**entry["checkpoint"])
                checkpoint.check_size(self.folder)
                self._states[entry["stop"]] = checkpoint
            if entry.get("batches") is not None:
                self._batches[entry["start"]] = FileRef(**entry["batches"])
                self._batches[entry["start"]].check_size(self.folder)
            if entry["steps"] is not None:
                ref = FileRef(**entry["steps"])
                steps.extend(decode_steps(self.folder / ref.name, ref.read(self.folder)))
        self.steps: Sequence[StepRecord] = tuple(steps)
        self.checkpoints: tuple[int, ...] = tuple(sorted(self._states))

    def __len__(self) -> int:
        return len(self.steps)

    def __repr__(self) -> str:
        how = "complete" if self.complete else f"incomplete: {self.reason}"
        return f"Trajectory({str(self.folder)!r}, {len(self.steps)} steps, {how})"

    def state(self, step: int) -> State:
        """The stored state before step ``step`` (one of ``checkpoints``), on the CPU, its hash checked."""
        if step not in self._states:
            raise MismatchError(
                message(
                    f"no checkpoint of step {step} is stored",
                    expected=f"one of {self._nearest_names(step)}",
                    remedy="replay from the nearest stored state before it: run.states(step, step + 1)",
                )
            )
        ref = self._states[step]
        return decode_state(self.folder / ref.name, ref.read(self.folder))

    @property
    def keeps_batches(self) -> bool:
        """Whether the batches themselves are stored."""
        return bool(self._batches)

    def batches(self, step: int) -> list[Any]:
        """The stored batches of a step, on the CPU: those of its micro-batches, then those of its ``passes``."""
        start = max(first for first in self._batches if first <= step)
        if self._segment[0] != start:
            ref = self._batches[start]
            self._segment = start, decode_batches(self.folder / ref.name, ref.read(self.folder))
        counts = [len(record.batches) + len(record.passes) for record in self.steps[start : step + 1]]
        return self._segment[1][sum(counts[:-1]) : sum(counts)]

    def nearest(self, step: int) -> int:
        """The last stored step at or before ``step``."""
        return max(stored for stored in self.checkpoints if stored <= step)

    def _nearest_names(self, step: int) -> list[int]:
        return sorted(sorted(self.checkpoints, key=lambda stored: abs(stored - step))[:6])


def _read_manifest(folder: Path) -> tuple[Manifest, bytes]:
    path = folder / MANIFEST
    if not path.is_file():
        raise StoreError(
            message(
                f"no recorded run in {folder}",
                expected=f"a file {MANIFEST}",
                cause="a wrong path, or a run that ended before its first optimizer step",
                remedy="give the folder that was given to hydragrad.record",
            )
        )
    data = path.read_bytes()
    try:
        content = loads(data)
        version = content["version"]
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(message(f"{path} cannot be read", got=str(error), remedy="record the run again")) from error
    if version not in READABLE:
        raise StoreError(
            message(
                f"{path} has another format version",
                expected=f"version {' or '.join(map(str, READABLE))}",
                got=f"version {version}",
                cause="the run was recorded by another release of hydragrad",
                remedy="load it with that release, or record the run again",
            )
        )
    known = {field.name for field in fields(Manifest)}
    if set(content) != known:
        raise StoreError(message(f"{path} was altered", got=f"unexpected fields {sorted(set(content) ^ known)}"))
    return Manifest(**content), data


def _read_journal(folder: Path, previous: str) -> list[dict[str, Any]]:
    """The journal's entries; a last line without its newline is a kill's trace and is dropped."""
    path = folder / JOURNAL
    if not path.is_file():
        raise StoreError(message(f"{path} is missing", remedy="copy the run's folder again"))
    lines = path.read_bytes().split(b"\n")[:-1]
    entries: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            entry = loads(line)
            chained = entry["previous"] == previous
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            chained = False
            entry = {}
        if not chained:
            raise StoreError(
                message(
                    f"line {number} of {path} does not follow from what precedes it",
                    expected=f"the hash of {'the manifest' if number == 1 else f'line {number - 1}'}",
                    cause=f"{JOURNAL} or {MANIFEST} was edited or swapped",
                    remedy="copy the run's folder again, or record the run again",
                )
            )
        entries.append(entry)
        previous = sha256(line + b"\n")
    if not entries:
        raise StoreError(message(f"{path} is empty", remedy="copy the run's folder again"))
    return entries
