"""The on-disk format: JSON that holds what JSON cannot, tensors as safetensors, hashed files written atomically.

A run's folder holds ``manifest.json`` (written once), ``journal.jsonl`` (one line per flushed segment, each carrying
the hash of what precedes it), ``steps/NNNNNNNN.safetensors`` and ``checkpoints/NNNNNNNN.safetensors``. Nothing is
pickled. The journal alone says which files count: whatever a killed run left beside it is ignored.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from hydragrad.errors import StoreError, UnsupportedError, message
from hydragrad.trajectory.state import State, StepRecord

VERSION = 1
MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.jsonl", "recording.lock"


def to_json(value: Any) -> Any:
    """Plain JSON for numbers (also NaN and infinities), strings, None, tuples, lists and string-keyed dicts."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    if isinstance(value, tuple):
        return {"$tuple": [to_json(part) for part in value]}
    if isinstance(value, list):
        return [to_json(part) for part in value]
    if isinstance(value, dict):
        return {str(key): to_json(part) for key, part in value.items()}
    raise UnsupportedError(
        message(
            "a value cannot be recorded",
            expected="numbers, strings, None, tuples, lists, dicts of these",
            got=f"{type(value).__name__}: {str(value)[:60]}",
        )
    )


def from_json(value: Any) -> Any:
    """Inverse of ``to_json``."""
    if isinstance(value, dict):
        if set(value) == {"$float"}:
            return float(value["$float"])
        if set(value) == {"$tuple"}:
            return tuple(from_json(part) for part in value["$tuple"])
        return {key: from_json(part) for key, part in value.items()}
    return [from_json(part) for part in value] if isinstance(value, list) else value


def dumps(value: Any) -> str:
    """One line of strict JSON."""
    return json.dumps(to_json(value), allow_nan=False, separators=(",", ":"))


def loads(text: str | bytes) -> Any:
    """Inverse of ``dumps``."""
    return from_json(json.loads(text))


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file, or nothing: a reader (or a kill) never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@final
@dataclass(frozen=True)
class FileRef:
    """A file that the journal vouches for: name inside the run's folder, size, hash."""

    name: str
    size: int
    sha256: str

    @staticmethod
    def write(folder: Path, name: str, data: bytes) -> "FileRef":
        """Write the file and return what vouches for it."""
        write_atomically(folder / name, data)
        return FileRef(name, len(data), sha256(data))

    def to_dict(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    def check_size(self, folder: Path) -> None:
        """Refuse a missing or truncated file, by name (cheap: nothing is read)."""
        path = folder / self.name
        if not path.is_file():
            raise StoreError(_broken(path, "is missing", f"a file of {self.size} bytes", "nothing"))
        if path.stat().st_size != self.size:
            raise StoreError(_broken(path, "has the wrong size", f"{self.size} bytes", f"{path.stat().st_size} bytes"))

    def read(self, folder: Path) -> bytes:
        """The file's bytes; refused by name if they are not what was written."""
        self.check_size(folder)
        data = (folder / self.name).read_bytes()
        if sha256(data) != self.sha256:
            raise StoreError(_broken(folder / self.name, "was altered", f"SHA-256 {self.sha256}", sha256(data)))
        return data


def _broken(path: Path, what: str, expected: str, got: str) -> str:
    return message(
        f"{path} {what}",
        expected=expected,
        got=got,
        cause="the file was edited, swapped, deleted or only partly copied after recording",
        remedy="copy the run's folder again, or record the run again",
    )


def save_tensors(tensors: dict[str, Tensor], tables: dict[str, Any]) -> bytes:
    """Named tensors and JSON tables as one safetensors file."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    return safetensors_save(plain, {"tables": dumps(tables)})


def load_tensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of ``save_tensors`` (``data``: the verified bytes of ``path``)."""
    try:
        with safe_open(path, framework="pt") as file:
            tables = loads((file.metadata() or {})["tables"])
        return safetensors_load(data), tables
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(_broken(path, "cannot be read", "a safetensors file with tables", str(error))) from error


def encode_state(state: State) -> bytes:
    """A checkpoint's bytes."""
    tensors = {f"param:{name}": tensor for name, tensor in state.params.items()}
    tensors |= {f"buffer:{name}": tensor for name, tensor in state.buffers.items()}
    for name, slots in state.optimizer.items():
        tensors |= {f"optimizer:{slot}:{name}": tensor for slot, tensor in slots.items()}
    return save_tensors(tensors, {"step": state.step})


def decode_state(path: Path, data: bytes) -> State:
    """Inverse of ``encode_state``."""
    tensors, tables = load_tensors(path, data)
    state = State(tables["step"], {}, {}, {})
    for key, tensor in tensors.items():
        kind, rest = key.split(":", 1)
        if kind == "optimizer":
            slot, name = rest.split(":", 1)
            state.optimizer.setdefault(name, {})[slot] = tensor
        else:
            (state.params if kind == "param" else state.buffers)[rest] = tensor
    return state


_CAT = torch.zeros(0, dtype=torch.int64)


def encode_steps(steps: list[StepRecord]) -> bytes:
    """A segment of steps: arrays as tensors; what rarely changes as tables that the steps point into."""
    groups, without, modes = _Table(), _Table(), _Table()
    pointers = [
        (
            step.index,
            len(step.batches),
            len(step.skipped),
            int(step.random),
            groups.place(step.groups),
            without.place(sorted(step.without_grad)),
            modes.place(dict(step.modes)),
        )
        for step in steps
    ]
    batches = [batch for step in steps for batch in step.batches]
    skipped = [batch for step in steps for batch in step.skipped]
    tensors = {
        "steps": torch.tensor(pointers, dtype=torch.int64).reshape(-1, 7),
        "ids": torch.cat([_CAT, *batches]),
        "digests": torch.cat([_CAT, *(d.to("cpu") for step in steps for d in step.digests)]),
        "lengths": torch.tensor([len(batch) for batch in batches], dtype=torch.int64),
        "epochs": torch.tensor([epoch for step in steps for epoch in step.epochs], dtype=torch.int64),
        "loaders": torch.tensor([loader for step in steps for loader in step.loaders], dtype=torch.int64),
        "skipped_ids": torch.cat([_CAT, *skipped]),
        "skipped_lengths": torch.tensor([len(batch) for batch in skipped], dtype=torch.int64),
        "fingerprints": torch.stack([step.fingerprint.to("cpu", torch.float64) for step in steps]),
    }
    return save_tensors(tensors, {"groups": groups.rows, "without_grad": without.rows, "modes": modes.rows})


def decode_steps(path: Path, data: bytes) -> list[StepRecord]:
    """Inverse of ``encode_steps``."""
    tensors, tables = load_tensors(path, data)
    groups = [tuple(row) for row in tables["groups"]]
    without = [frozenset(row) for row in tables["without_grad"]]
    modes = tables["modes"]
    lengths = tensors["lengths"].tolist()
    ids, digests = tensors["ids"].split(lengths), tensors["digests"].split(lengths)
    skipped = tensors["skipped_ids"].split(tensors["skipped_lengths"].tolist())
    epochs, loaders = tensors["epochs"].tolist(), tensors["loaders"].tolist()
    steps, at, skipped_at = [], 0, 0
    for k, (index, count, skips, random, group, none, mode) in enumerate(tensors["steps"].tolist()):
        here, there = slice(at, at + count), slice(skipped_at, skipped_at + skips)
        at, skipped_at = at + count, skipped_at + skips
        steps.append(
            StepRecord(
                index=index,
                epoch=epochs[here][0] if count else 0,
                batches=tuple(ids[here]),
                digests=tuple(digests[here]),
                groups=groups[group],
                without_grad=without[none],
                fingerprint=tensors["fingerprints"][k],
                random=bool(random),
                modes=modes[mode],
                epochs=tuple(epochs[here]),
                loaders=tuple(loaders[here]),
                skipped=tuple(skipped[there]),
            )
        )
    return steps


@final
class _Table:
    """Distinct rows in order of appearance."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, row: Any) -> int:
        key = dumps(row)
        if key not in self._places:
            self._places[key] = len(self.rows)
            self.rows.append(row)
        return self._places[key]
