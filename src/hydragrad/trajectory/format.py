"""The on-disk format: JSON that holds what JSON cannot, tensors as safetensors, hashed files written atomically.

A run's folder holds ``manifest.json`` (written once), ``journal.jsonl`` (one line per flushed segment, each carrying
the hash of what precedes it and its own), ``steps/NNNNNNNN.safetensors`` and ``checkpoints/NNNNNNNN.safetensors``.
Nothing is pickled. The journal alone says which files count: whatever a killed run left beside it is ignored.
"""

from pathlib import Path
from typing import Any, final

import torch

from hydragrad.files import dumps, load_tensors, reading, save_tensors
from hydragrad.trajectory.state import State, StepRecord

VERSION = 2
MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.jsonl", "recording.lock"


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
    with reading(path):
        state = State(tables["step"], {}, {}, {})
        for key, tensor in tensors.items():
            kind, rest = key.split(":", 1)
            if kind == "optimizer":
                slot, name = rest.split(":", 1)
                state.optimizer.setdefault(name, {})[slot] = tensor
            else:
                {"param": state.params, "buffer": state.buffers}[kind][rest] = tensor
    return state


_CAT = torch.zeros(0, dtype=torch.int64)
_COUNTS = ("steps", "lengths", "epochs", "loaders", "skipped_lengths")


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
    """Inverse of ``encode_steps``; raises StoreError for what it never writes."""
    tensors, tables = load_tensors(path, data)
    with reading(path):
        return _decode_steps(tensors, tables)


def _decode_steps(tensors: dict[str, torch.Tensor], tables: dict[str, Any]) -> list[StepRecord]:
    groups = [tuple(row) for row in tables["groups"]]
    without = [frozenset(row) for row in tables["without_grad"]]
    modes = tables["modes"]
    lengths = tensors["lengths"].tolist()
    ids, digests = tensors["ids"].split(lengths), tensors["digests"].split(lengths)
    skipped = tensors["skipped_ids"].split(tensors["skipped_lengths"].tolist())
    epochs, loaders = tensors["epochs"].tolist(), tensors["loaders"].tolist()
    steps, at, skipped_at = [], 0, 0
    if int(torch.cat([_CAT, *(tensors[name].flatten() for name in _COUNTS)]).min()) < 0:
        raise ValueError("a negative count or place in a table")
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
    if (at, at, at, skipped_at) != (len(ids), len(epochs), len(loaders), len(skipped)):
        raise ValueError("batches that belong to no step")
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
