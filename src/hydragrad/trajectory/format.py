"""The on-disk format: JSON that holds what JSON cannot, tensors as safetensors, hashed files written atomically.

A run's folder holds ``manifest.json`` (written once), ``journal.jsonl`` (one line per flushed segment, each carrying
the hash of what precedes it and its own), ``steps/NNNNNNNN.safetensors`` and ``checkpoints/NNNNNNNN.safetensors``.
Nothing is pickled. The journal alone says which files count: whatever a killed run left beside it is ignored.
"""

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from hydragrad.files import load_tensors, reading, save_tensors
from hydragrad.step.clipping import Clip
from hydragrad.trajectory.randomness import RandomState
from hydragrad.trajectory.state import State, StepRecord
from hydragrad.trajectory.tables import (
    Table,
    decode_digests,
    decode_draws,
    decode_passes,
    encode_digests,
    encode_draws,
    encode_passes,
    plain_autocast,
)
from hydragrad.trajectory.watching import Autocast

VERSION = 6
KINDS = ("steps", "batches", "point", "checkpoint")
"""The files that a journal's line may vouch for."""
MANIFEST, JOURNAL, LOCK = "manifest.json", "journal.jsonl", "recording.lock"


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
    with reading(path):
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
                {"param": state.params, "buffer": state.buffers}[kind][rest] = tensor
    return state


_CAT = torch.zeros(0, dtype=torch.int64)
_COUNTS = ("steps", "lengths", "epochs", "loaders", "skipped_lengths", "autocast")


def encode_steps(steps: list[StepRecord]) -> bytes:
    """A segment of steps: arrays as tensors; what rarely changes as tables that the steps point into."""
    groups, without, modes, clips, frozen, autocast = (Table() for _ in range(6))
    pointers = [
        (
            step.index,
            len(step.batches),
            len(step.skipped),
            len(step.passes),
            groups.place(step.groups),
            without.place(step.without_grad, sorted),
            modes.place(step.modes, dict),
            clips.place(step.clips, lambda row: [asdict(clip) for clip in row]),
            frozen.place(step.frozen, sorted),
            step.fingerprint is not None,
        )
        for step in steps
    ]
    batches = [batch for step in steps for batch in step.batches]
    skipped = [batch for step in steps for batch in step.skipped]
    fingerprints = [step.fingerprint.to("cpu", torch.float64) for step in steps if step.fingerprint is not None]
    tensors = {
        "steps": torch.tensor(pointers, dtype=torch.int64).reshape(-1, 10),
        "ids": torch.cat([_CAT, *batches]),
        **encode_digests([part for step in steps for part in step.digests], "digests"),
        "lengths": torch.tensor([len(batch) for batch in batches], dtype=torch.int64),
        "epochs": torch.tensor([epoch for step in steps for epoch in step.epochs], dtype=torch.int64),
        "loaders": torch.tensor([loader for step in steps for loader in step.loaders], dtype=torch.int64),
        "skipped_ids": torch.cat([_CAT, *skipped]),
        "skipped_lengths": torch.tensor([len(batch) for batch in skipped], dtype=torch.int64),
        "fingerprints": torch.stack([torch.zeros(3, dtype=torch.float64), *fingerprints])[1:],
    }
    casts = [cast for step in steps for cast in (step.autocast or (None,) * len(step.batches))]
    passes = [one for step in steps for one in step.passes]
    draws = [draw for step in steps for draw in (step.draws or (None,) * len(step.batches))]
    tensors |= encode_draws([*draws, *(one.draw for one in passes)])
    tensors |= encode_passes(passes, modes, autocast)
    tensors["autocast"] = torch.tensor([autocast.place(cast, plain_autocast) for cast in casts], dtype=torch.int64)
    tensors["scales"] = torch.tensor([math.nan if s.scale is None else s.scale for s in steps], dtype=torch.float64)
    tables = {"groups": groups, "without_grad": without, "modes": modes, "clips": clips}
    tables |= {"frozen": frozen, "autocast": autocast}
    rows = ",".join([f'"{name}":{table.json()}' for name, table in tables.items()])
    return save_tensors(tensors, f"{{{rows}}}")


def decode_steps(path: Path, data: bytes) -> list[StepRecord]:
    """Inverse of ``encode_steps``; raises StoreError for what it never writes."""
    tensors, tables = load_tensors(path, data)
    with reading(path):
        return _decode_steps(tensors, tables)


def _decode_steps(tensors: dict[str, torch.Tensor], tables: dict[str, Any]) -> list[StepRecord]:
    groups = [tuple(row) for row in tables["groups"]]
    without, frozen = ([frozenset(row) for row in tables[name]] for name in ("without_grad", "frozen"))
    clips = [tuple(Clip(**clip) for clip in row) for row in tables["clips"]]
    casts = [None if row is None else Autocast(*row) for row in tables["autocast"]]
    modes = tables["modes"]
    lengths = tensors["lengths"].tolist()
    ids, digests = tensors["ids"].split(lengths), decode_digests(tensors, "digests", lengths)
    skipped = tensors["skipped_ids"].split(tensors["skipped_lengths"].tolist())
    epochs, loaders = tensors["epochs"].tolist(), tensors["loaders"].tolist()
    autocast, scales = tensors["autocast"].tolist(), tensors["scales"].tolist()
    draws = decode_draws(tensors)
    passes = decode_passes(tensors, modes, casts, draws[len(lengths) :])
    fingerprints = iter(tensors["fingerprints"])
    steps, at, skipped_at, passed_at = [], 0, 0, 0
    if int(torch.cat([_CAT, *(tensors[name].flatten() for name in _COUNTS)]).min()) < 0:
        raise ValueError("a negative count or place in a table")
    for k, (index, count, skips, passed, group, none, mode, clip, held, noted) in enumerate(tensors["steps"].tolist()):
        here, there = slice(at, at + count), slice(skipped_at, skipped_at + skips)
        by = slice(passed_at, passed_at + passed)
        at, skipped_at, passed_at = at + count, skipped_at + skips, passed_at + passed
        steps.append(
            StepRecord(
                index=index,
                epoch=epochs[here][0] if count else 0,
                batches=tuple(ids[here]),
                digests=tuple(digests[here]),
                groups=groups[group],
                without_grad=without[none],
                fingerprint=next(fingerprints, None) if noted else None,
                modes=modes[mode],
                epochs=tuple(epochs[here]),
                loaders=tuple(loaders[here]),
                skipped=tuple(skipped[there]),
                draws=tuple(draws[here]),
                clips=clips[clip],
                scale=None if math.isnan(scales[k]) else scales[k],
                autocast=tuple([casts[place] for place in autocast[here]]),
                frozen=frozen[held],
                passes=tuple(passes[by]),
            )
        )
    ends = (at, at, at, at, skipped_at, passed_at, at + passed_at)
    if ends != (len(ids), len(epochs), len(loaders), len(autocast), len(skipped), len(passes), len(draws)):
        raise ValueError("batches that belong to no step")
    if next(fingerprints, None) is not None:
        raise ValueError("gradients that belong to no step")
    return steps
