"""The on-disk format: JSON that holds what JSON cannot, tensors as safetensors, hashed files written atomically.

A run's folder holds ``manifest.json`` (written once), ``journal.jsonl`` (one line per flushed segment, each carrying
the hash of what precedes it), ``steps/NNNNNNNN.safetensors`` and ``checkpoints/NNNNNNNN.safetensors``. Nothing is
pickled. The journal alone says which files count: whatever a killed run left beside it is ignored.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import torch

from hydragrad.errors import StoreError
from hydragrad.files import broken_file, load_tensors, save_tensors, sha256, write_atomically
from hydragrad.step.clipping import Clip
from hydragrad.trajectory.randomness import RandomState
from hydragrad.trajectory.state import State, StepRecord
from hydragrad.trajectory.tables import Table, decode_draws, encode_draws

VERSION = 2
"""Written. Version 1 (no random states) is read too."""
READABLE = (1, 2)
MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.jsonl", "recording.lock"


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
            raise StoreError(broken_file(path, "is missing", f"a file of {self.size} bytes", "nothing"))
        if path.stat().st_size != self.size:
            raise StoreError(
                broken_file(path, "has the wrong size", f"{self.size} bytes", f"{path.stat().st_size} bytes")
            )

    def read(self, folder: Path) -> bytes:
        """The file's bytes; refused by name if they are not what was written."""
        self.check_size(folder)
        data = (folder / self.name).read_bytes()
        if sha256(data) != self.sha256:
            raise StoreError(broken_file(folder / self.name, "was altered", f"SHA-256 {self.sha256}", sha256(data)))
        return data


def encode_state(state: State) -> bytes:
    """A checkpoint's bytes."""
    tensors = {f"param:{name}": tensor for name, tensor in state.params.items()}
    tensors |= {f"buffer:{name}": tensor for name, tensor in state.buffers.items()}
    for name, slots in state.optimizer.items():
        tensors |= {f"optimizer:{slot}:{name}": tensor for slot, tensor in slots.items()}
    if state.random is not None:
        tensors |= {f"random:{name}": tensor for name, tensor in state.random.tensors().items()}
    return save_tensors(tensors, {"step": state.step})


def decode_state(path: Path, data: bytes) -> State:
    """Inverse of ``encode_state``."""
    tensors, tables = load_tensors(path, data)
    random = {key.split(":")[1]: tensor for key, tensor in tensors.items() if key.startswith("random:")}
    state = State(tables["step"], {}, {}, {}, RandomState.of(random) if random else None)
    for key, tensor in tensors.items():
        kind, rest = key.split(":", 1)
        if kind == "random":
            continue
        if kind == "optimizer":
            slot, name = rest.split(":", 1)
            state.optimizer.setdefault(name, {})[slot] = tensor
        else:
            (state.params if kind == "param" else state.buffers)[rest] = tensor
    return state


_CAT = torch.zeros(0, dtype=torch.int64)


def encode_steps(steps: list[StepRecord]) -> bytes:
    """A segment of steps: arrays as tensors; what rarely changes as tables that the steps point into."""
    groups, without, modes, clips = Table(), Table(), Table(), Table()
    pointers = [
        (
            step.index,
            len(step.batches),
            len(step.skipped),
            int(step.random),  # all that the first version said of randomness
            groups.place(step.groups),
            without.place(sorted(step.without_grad)),
            modes.place(dict(step.modes)),
            clips.place([asdict(clip) for clip in step.clips]),
        )
        for step in steps
    ]
    batches = [batch for step in steps for batch in step.batches]
    skipped = [batch for step in steps for batch in step.skipped]
    tensors = {
        "steps": torch.tensor(pointers, dtype=torch.int64).reshape(-1, 8),
        "ids": torch.cat([_CAT, *batches]),
        "digests": torch.cat([_CAT, *(d.to("cpu") for step in steps for d in step.digests)]),
        "lengths": torch.tensor([len(batch) for batch in batches], dtype=torch.int64),
        "epochs": torch.tensor([epoch for step in steps for epoch in step.epochs], dtype=torch.int64),
        "loaders": torch.tensor([loader for step in steps for loader in step.loaders], dtype=torch.int64),
        "skipped_ids": torch.cat([_CAT, *skipped]),
        "skipped_lengths": torch.tensor([len(batch) for batch in skipped], dtype=torch.int64),
        "fingerprints": torch.stack([step.fingerprint.to("cpu", torch.float64) for step in steps]),
    }
    tensors |= encode_draws([draw for step in steps for draw in (step.draws or (None,) * len(step.batches))])
    return save_tensors(
        tensors, {"groups": groups.rows, "without_grad": without.rows, "modes": modes.rows, "clips": clips.rows}
    )


def decode_steps(path: Path, data: bytes) -> list[StepRecord]:
    """Inverse of ``encode_steps``."""
    tensors, tables = load_tensors(path, data)
    groups = [tuple(row) for row in tables["groups"]]
    without = [frozenset(row) for row in tables["without_grad"]]
    modes = tables["modes"]
    clips = [tuple(Clip(**clip) for clip in row) for row in tables.get("clips", [])]
    lengths = tensors["lengths"].tolist()
    ids, digests = tensors["ids"].split(lengths), tensors["digests"].split(lengths)
    skipped = tensors["skipped_ids"].split(tensors["skipped_lengths"].tolist())
    epochs, loaders = tensors["epochs"].tolist(), tensors["loaders"].tolist()
    draws = decode_draws(tensors, len(lengths))
    steps, at, skipped_at = [], 0, 0
    for k, (index, count, skips, random, group, none, mode, *more) in enumerate(tensors["steps"].tolist()):
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
                modes=modes[mode],
                epochs=tuple(epochs[here]),
                loaders=tuple(loaders[here]),
                skipped=tuple(skipped[there]),
                clips=clips[more[0]] if more else (),
                draws=tuple(draws[here] if "draws" in tensors or not random else [{}] * count),
            )
        )
    return steps
