"""Reading a recorded run: opened from its folder, checked, never unpickled."""

import os
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar, final

from hydragrad.errors import MismatchError, StoreError, message
from hydragrad.files import broken_file, loads, path_of, read_bytes, reading, sha256
from hydragrad.journal import Entry, FileRef, read_journal
from hydragrad.trajectory.format import JOURNAL, KINDS, MANIFEST, VERSION, decode_state, decode_steps
from hydragrad.trajectory.keeping import decode_batches
from hydragrad.trajectory.points import Point, decode_point
from hydragrad.trajectory.state import Manifest, State, StepRecord
from hydragrad.trajectory.validation import (
    check_draws,
    check_entries,
    check_manifest,
    check_point,
    check_state,
    check_steps,
)

_UNSAID = "the recording process was killed, or its disk was full: it could not say how it ended"


@final
class Trajectory:
    """A recorded run as it lies in a folder.

    ``steps``: what happened, step by step (as far as the run was flushed); ``checkpoints``: the steps t whose state
    is stored; ``complete``: whether the recorded block ended normally, else ``reason`` says why not.
    Raises StoreError for a missing, altered, truncated or swapped file, naming it.
    Example: ``Trajectory("runs/digits").state(0).params``.
    """

    weights: ClassVar[None] = None
    """The recorded run is the one in which every example weighs 1; see trajectory.reweighted for others."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = path_of(folder)
        self.manifest, described = _read_manifest(self.folder)
        journal = self.folder / JOURNAL
        entries, written = read_journal(journal, sha256(described), MANIFEST)
        check_entries(entries, journal)
        last, gone = entries[-1], {step for entry in entries for step in entry.get("dropped", ())}
        self.complete: bool = bool(last.get("end") and last["complete"])
        self.reason: str = last["reason"] if last.get("end") else _UNSAID
        if not last.get("end"):
            entries, lost = _whole(entries, gone, self.folder, journal)
            self.reason += lost
        self.lines = len(entries)
        """Of the journal: those that were read."""
        self.trailing: list[list[int]] = last["skipped"] if last.get("end") else []
        """Ids of the batches after the last step."""
        self.moved: bool = self.complete and last.get("moved", False)
        """Whether buffers changed after the last step: the trained model is not the one that the steps lead to."""
        self.identity: str = sha256(described + written)
        """What tells this run, as far as it was recorded, from every other."""
        self._states: dict[int, FileRef] = {}
        self._batches: dict[int, FileRef] = {}
        self._segment: tuple[int, list[Any]] = (-1, [])
        self._points: dict[int, FileRef] = {}
        steps, resumptions = list[StepRecord](), list[tuple[int, int]]()
        for entry in entries:
            if entry.get("end"):
                continue
            if entry["checkpoint"] is not None:
                self._states[entry["stop"]] = FileRef.of(entry["checkpoint"], journal)
            if entry.get("point") is not None:
                self._points[entry["stop"]] = FileRef.of(entry["point"], journal)
                self._points[entry["stop"]].check_size(self.folder)
            if "resumed" in entry:
                resumptions.append((entry["stop"], entry["resumed"]))
            if entry.get("batches") is not None:
                kept = FileRef.of(entry["batches"], journal)
                kept.check_size(self.folder)
                self._batches[entry["start"]] = kept
            if entry["steps"] is not None:
                ref = FileRef.of(entry["steps"], journal)
                path = self.folder / ref.name
                segment = decode_steps(path, ref.read(self.folder))
                check_steps(segment, self.manifest, range(entry["start"], entry["stop"]), path)
                check_draws(segment, path)
                steps.extend(segment)
        for dropped in gone & set(self._states):
            del self._states[dropped]
        for checkpoint in self._states.values():
            checkpoint.check_size(self.folder)
        self.steps: Sequence[StepRecord] = tuple(steps)
        self.checkpoints: tuple[int, ...] = tuple(sorted(self._states))
        self.points: tuple[int, ...] = tuple(sorted(self._points))
        """Steps t before which it is known where the loop stood, so that it can go on from there."""
        self.resumptions: tuple[tuple[int, int], ...] = tuple(resumptions)
        """(step, recorded steps dropped there) for every time the recording was gone on with after its process died."""

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
        path = self.folder / ref.name
        state = decode_state(path, ref.read(self.folder))
        check_state(state, self.manifest, step, path)
        return state

    def point(self, step: int) -> Point:
        """Where the loop stood before step ``step`` (one of ``points``)."""
        path = self.folder / self._points[step].name
        point = decode_point(path, self._points[step].read(self.folder))
        check_point(point, self.manifest, step, path)
        return point

    @property
    def keeps_batches(self) -> bool:
        """Whether the batches themselves are stored."""
        return bool(self._batches)

    def batches(self, step: int) -> list[Any]:
        """The stored batches of a step, on the CPU: those of its micro-batches, then those of its ``passes``."""
        start = max(first for first in self._batches if first <= step)
        path = self.folder / self._batches[start].name
        if self._segment[0] != start:
            self._segment = start, decode_batches(path, self._batches[start].read(self.folder))
        counts = [len(record.batches) + len(record.passes) for record in self.steps[start : step + 1]]
        found = self._segment[1][sum(counts[:-1]) : sum(counts)]
        if len(found) != counts[-1]:
            raise StoreError(broken_file(path, "lacks batches", f"{counts[-1]} of step {step}", str(len(found))))
        return found

    def nearest(self, step: int) -> int:
        """The last stored step at or before ``step``."""
        return max(stored for stored in self.checkpoints if stored <= step)

    def _nearest_names(self, step: int) -> list[int]:
        return sorted(sorted(self.checkpoints, key=lambda stored: abs(stored - step))[:6])


def _whole(entries: list[Entry], gone: set[int], folder: Path, journal: Path) -> tuple[list[Entry], str]:
    """Of a run whose end was not written: what precedes the first file that is not as long as it was, and its name.

    Such a run may have ended with the power, and before the system had written that file to the disk.
    """
    for entry in entries[1:]:  # the first one's was on the disk before the run existed
        for kind in KINDS:
            if not entry.get(kind) or (kind == "checkpoint" and entry["stop"] in gone):
                continue
            ref = FileRef.of(entry[kind], journal)
            if not ref.whole(folder):
                lost = f"; lost from step {entry['start']} on, since {ref.name} is not whole (a failure of power?)"
                return entries[: entries.index(entry)], lost
    return entries, ""


def _read_manifest(folder: Path) -> tuple[Manifest, bytes]:
    path = folder / MANIFEST
    if not os.path.isfile(path):
        raise StoreError(
            message(
                f"no recorded run in {os.path.abspath(folder) if os.path.basename(folder) in ('', '.') else folder}",
                expected=f"a folder with a file {MANIFEST}",
                got="a file" if os.path.isfile(folder) else None,
                cause="a wrong path, or a run that ended before its first optimizer step",
                remedy="give the folder that was given to hydragrad.record",
            )
        )
    data = read_bytes(path)
    with reading(path):
        content = loads(data)
        version = content["version"]
    if version != VERSION:
        raise StoreError(
            message(
                f"{path} has another format version",
                expected=f"version {VERSION}",
                got=f"version {str(version)[:20]}",
                cause="the run was recorded by another release of hydragrad",
                remedy="load it with that release, or record the run again",
            )
        )
    known = {field.name for field in fields(Manifest)}
    if set(content) != known:
        raise StoreError(message(f"{path} was altered", got=f"unexpected fields {sorted(set(content) ^ known)[:8]}"))
    manifest = Manifest(**content)
    check_manifest(manifest, path)
    return manifest, data
