"""What a store says must also make sense: types, shapes, ranges and counts, for files that were altered with care.

Hashes find damage and plain edits. Whoever writes new hashes as well gets past them, and is stopped here: nothing that
is read leads to a crash, to code that runs, or to a file outside the run's folder.
"""

import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Union

import torch

from hydragrad.errors import StoreError
from hydragrad.files import broken_file
from hydragrad.journal import Entry
from hydragrad.step.clipping import Clip
from hydragrad.step.known import class_of_torch
from hydragrad.trajectory.hyper import are_forms
from hydragrad.trajectory.optimizers import misfit
from hydragrad.trajectory.points import Point
from hydragrad.trajectory.sparing import ALWAYS
from hydragrad.trajectory.state import Hyper, Manifest, State, StepRecord
from hydragrad.trajectory.watching import Autocast

_LARGEST = 2**48
"""Sizes and ids beyond this are no data set's and no tensor's."""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation, down to the parts of containers (a bool is no int here)."""
    if hint is Any:
        return True
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin is None:
        return value is None if hint in (None, type(None)) else type(value) is hint
    if origin is tuple:
        return isinstance(value, tuple) and all(fits(part, parts[0]) for part in value)
    if origin in (list, frozenset):
        return isinstance(value, origin) and all(fits(part, parts[0]) for part in value)
    return isinstance(value, Mapping) and all(fits(k, parts[0]) and fits(v, parts[1]) for k, v in value.items())


def check_manifest(manifest: Manifest, path: Path) -> None:
    """Refuse a description of a run that no recording writes."""
    refuse = _refusal(path, "was altered")
    for field in fields(Manifest):
        if not fits(getattr(manifest, field.name), field.type):
            refuse(f"{field.name} of type {field.type}", getattr(manifest, field.name))
    for name, spec in [*manifest.params.items(), *manifest.buffers.items()]:
        if not _is_spec(spec):
            refuse(f"shape and dtype of {name!r}", spec)
    if not all(type(spec.get("requires_grad")) is bool for spec in manifest.params.values()):
        refuse("requires_grad of every parameter", "none")
    if not fits(manifest.optimizer.get("class"), str) or not fits(manifest.optimizer.get("module"), str):
        refuse("the names of an optimizer's class and module", manifest.optimizer)
    if not all(_is_layout(spec) for spec in (*manifest.params.values(), *manifest.buffers.values())):
        refuse("dense strides", "others")
    groups = manifest.optimizer.get("groups")
    if not fits(groups, list[list[str]]):
        refuse("lists of parameters' names", groups)
    grouped = [name for names in groups or () for name in names]
    if len(set(grouped)) != len(grouped) or not set(grouped) <= set(manifest.params):
        refuse("every parameter in at most one group", grouped)
    if manifest.collate.get("mode") not in ("samples", "index", "indices"):
        refuse("a way to fetch batches", manifest.collate)
    if not 0 <= (manifest.data_length or 0) < _LARGEST or not 1 <= manifest.checkpoint_every < _LARGEST:
        refuse("sizes in range", (manifest.data_length, manifest.checkpoint_every))
    if not all(fits(leaf.get("path"), str) and "dtype" in leaf and "shape" in leaf for leaf in manifest.batch):
        refuse("paths, dtypes and shapes of a batch", manifest.batch)
    if manifest.reduction not in (None, "mean", "sum"):
        refuse("a reduction", manifest.reduction)


def check_entries(entries: list[Entry], path: Path) -> None:
    """Refuse a journal whose segments do not follow each other, or whose end is not said as a recording says it."""
    refuse = _refusal(path, "was altered")
    reached, stored = 0, set[int]()
    for number, entry in enumerate(entries, start=1):
        stop: Any = entry.get("stop")
        if type(stop) is not int or not reached <= stop < _LARGEST:
            refuse(f"line {number} to go on from step {reached}", entry)
        if "end" in entry:
            types_ = {"end": bool, "complete": bool, "reason": str, "skipped": list[list[int]]}
            said = all(fits(entry.get(k), hint) for k, hint in types_.items()) and fits(entry.get("moved", True), bool)
            if number == 1 or stop != reached or not said:
                refuse(f"line {number} to say how the run ended at step {reached}", entry)
            continue
        if not {"steps", "checkpoint"} <= set(entry) or entry.get("start") != reached:
            refuse(f"line {number} to start at step {reached}", entry)
        if (entry["steps"] is None) != (stop == reached) or (number == 1 and stop != 0):
            refuse(f"line {number} to hold the steps it counts", entry)
        if stop == 0 and (number == 1) != (entry["checkpoint"] is not None):
            refuse("the state before the first step, once", entry)
        if not fits(entry.get("resumed", 0), int) or entry.get("resumed", 0) < 0:
            refuse(f"line {number} to count the steps that were dropped", entry)
        dropped = entry.get("dropped", [])
        if not fits(dropped, list[int]) or len(set(dropped)) < len(dropped) or not set(dropped) <= stored - {0}:
            refuse(f"line {number} to drop states that are stored, but the first", entry)
        stored = (stored - set(dropped)) | ({stop} if entry["checkpoint"] is not None else set())
        reached = stop


def check_steps(steps: list[StepRecord], manifest: Manifest, indices: range, path: Path) -> None:
    """Refuse steps that are not those of the journal, or that name what the run does not have."""
    refuse = _refusal(path, "holds steps that no recording writes")
    if [step.index for step in steps] != list(indices):
        refuse(f"steps {indices.start} to {indices.stop - 1}", [step.index for step in steps][:8])
    limit = _LARGEST if manifest.data_length is None else manifest.data_length
    ids = [ids for step in steps for ids in (*step.batches, *step.skipped, *(one.ids for one in step.passes))]
    digests = [part for step in steps for part in (*step.digests, *(one.digests for one in step.passes))]
    digests = [part for part in digests if part is not None]
    if any(part.dim() != 1 or part.dtype != torch.int64 for part in (*ids, *digests)):
        refuse("int64 ids and digests", [str(part.dtype) for part in (*ids, *digests)][:4])
    flat = torch.cat([torch.zeros(1, dtype=torch.int64), *ids])
    if int(flat.min()) < 0 or int(flat.max()) >= max(limit, 1):
        refuse(f"ids from 0 to {limit - 1}", f"ids from {int(flat.min())} to {int(flat.max())}")
    for step in steps:
        if not step.batches:
            refuse(f"batches of step {step.index}", 0)
        _check_circumstances(step, manifest, refuse)
        if step.fingerprint is None and step.index < ALWAYS:
            refuse(f"fingerprints of the first {ALWAYS} gradients", f"none at step {step.index}")
        if step.fingerprint is not None and (step.fingerprint.shape != (3,) or step.fingerprint.dtype != torch.float64):
            refuse("a gradient's fingerprint", step.fingerprint)
    optimizer = class_of_torch(manifest.optimizer)
    for step in _distinct(steps, lambda step: (id(step.groups), id(step.without_grad), id(step.modes))):
        if len(step.groups) != len(manifest.optimizer["groups"]) or not all(map(_is_hyper, step.groups)):
            refuse("hyperparameters of every param group", step.groups)
        odd = [misfit(optimizer, group) for group in step.groups] if optimizer else []
        if any(odd):
            refuse(f"hyperparameters of {optimizer.__name__ if optimizer else ''}", (odd, step.groups))
        if not fits(step.without_grad, frozenset[str]) or not step.without_grad <= set(manifest.params):
            refuse("names of parameters without gradient", sorted(map(str, step.without_grad))[:4])
        if not fits(step.modes, dict[str, bool]):
            refuse("modules' modes", step.modes)


def _check_circumstances(step: StepRecord, manifest: Manifest, refuse: Callable[[str, Any], None]) -> None:
    """Passes, clips, scales, autocast and frozen names of one step."""
    for one in step.passes:
        if not 0 <= one.place <= len(step.batches) or one.epoch < 0:
            refuse(f"skipped batches of step {step.index} among its {len(step.batches)}", one.place)
        if not fits(one.modes, dict[str, bool]):
            refuse("modules' modes", one.modes)
    for clip in step.clips:
        if any(not fits(getattr(clip, field.name), field.type) for field in fields(Clip)):
            refuse("arguments of a clip", clip)
        if clip.kind not in ("norm", "value") or not set(clip.names) <= set(manifest.params):
            refuse("a clip of the model's parameters", clip)
    if step.scale is not None and not 0 < step.scale < float("inf"):
        refuse("a gradient scaler's scale", step.scale)
    for cast in (*step.autocast, *(one.autocast for one in step.passes)):
        if cast is not None and (
            any(not fits(getattr(cast, field.name), field.type) for field in fields(Autocast))
            or cast.dtype not in ("bfloat16", "float16", "float32")
            or not fits(cast.device_type, str)
            or not _is_device(cast.device_type)
        ):
            refuse("a device and a dtype of autocast", cast)
    if not fits(step.frozen, frozenset[str]) or not step.frozen <= set(manifest.params):
        refuse("names of frozen parameters", sorted(map(str, step.frozen))[:4])


def check_draws(steps: list[StepRecord], path: Path) -> None:
    """Refuse random states of a wrong form, and draws that go on where none had ended since the last checkpoint."""
    refuse = _refusal(path, "holds random states that no recording writes")
    begun: set[str] = set()
    for step in steps:
        for draw in [draw for k in range(len(step.batches) + 1) for draw in _draws_at(step, k)]:
            for name, state in (draw or {}).items():
                if state is None and name not in begun:
                    refuse(f"a state of {name} at step {step.index}", "a draw that goes on from nowhere")
                if state is not None and (state.dim() != 1 or state.dtype != torch.uint8):
                    refuse("random states as bytes", f"{state.dtype} of shape {list(state.shape)}")
                begun.add(name)


def _draws_at(step: StepRecord, place: int) -> list[Any]:
    passed = [one.draw for one in step.passes if one.place == place]
    return passed + list(step.draws[place : place + 1])


def _is_device(name: str) -> bool:
    try:
        return torch.device(name).type == name
    except RuntimeError:
        return False


def check_state(state: State, manifest: Manifest, step: int, path: Path) -> None:
    """Refuse a state that is not of this model and optimizer, or not of this step."""
    refuse = _refusal(path, "holds a state that no recording writes")
    if type(state.step) is not int or state.step != step:
        refuse(f"the state of step {step}", state.step)
    for kind, held, specs in (("params", state.params, manifest.params), ("buffers", state.buffers, manifest.buffers)):
        if set(held) != set(specs):
            refuse(f"{kind} {sorted(specs)[:4]}", sorted(held)[:4])
        for name, tensor in held.items():
            spec = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
            if any(spec[key] != specs[name][key] for key in spec):
                refuse(f"{name!r} of {specs[name]}", spec)
    random = {} if state.random is None else state.random.tensors()
    if any(part.dim() != 1 or part.dtype != torch.uint8 for part in random.values()):
        refuse("random states as bytes", {name: part.dtype for name, part in random.items()})
    if not set(state.optimizer) <= set(manifest.params):
        refuse("optimizer state of parameters", sorted(state.optimizer)[:4])
    if class_of_torch(manifest.optimizer) is None:
        return  # its slots may have any form
    for name, slots in state.optimizer.items():
        for slot, tensor in slots.items():
            if not _broadcasts(tensor.shape, state.params[name].shape):
                refuse(f"{slot!r} of {name!r} to fit {list(state.params[name].shape)}", list(tensor.shape))


def check_point(point: Point, manifest: Manifest, step: int, path: Path) -> None:
    """Refuse a point that is not of this run, or not of this step."""
    refuse = _refusal(path, "says of a loop what no recording writes")
    if point.step != step:
        refuse(f"the point of step {step}", point.step)
    if len(point.groups) != len(manifest.optimizer["groups"]) or not all(map(_is_hyper, point.groups)):
        refuse("hyperparameters of every param group", point.groups)


def _refusal(path: Path, what: str) -> Callable[[str, Any], None]:
    def refuse(expected: str, got: Any) -> None:
        raise StoreError(broken_file(path, what, expected, repr(got)[:200]))

    return refuse


def _is_spec(spec: dict[str, Any]) -> bool:
    shape, dtype = spec.get("shape"), spec.get("dtype")
    if not fits(shape, list[int]) or not isinstance(dtype, str) or not isinstance(shape, list):
        return False
    return all(0 <= n < _LARGEST for n in shape) and isinstance(getattr(torch, dtype, None), torch.dtype)


def _is_layout(spec: dict[str, Any]) -> bool:
    """Whether the strides, if there are any, lay the elements out without gaps: they say how much memory is taken."""
    stride, shape = spec.get("stride"), spec["shape"]
    if stride is None:
        return True
    if not fits(stride, list[int]) or len(stride) != len(shape) or any(s < 0 for s in stride):
        return False
    dense = 1
    for s, n in sorted((s, n) for s, n in zip(stride, shape, strict=True) if n != 1):
        if s != dense:
            return False
        dense *= n
    return True


def _is_hyper(group: Hyper) -> bool:
    """Names of hyperparameters, not of what a param group holds beside them; plain values."""
    return fits(group, dict[str, Any]) and not {"params", "param_names"} & set(group) and are_forms(group)


def _broadcasts(slot: torch.Size, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(slot, shape) == shape or slot.numel() == 1
    except RuntimeError:
        return False


def _distinct(steps: Iterable[StepRecord], key: Callable[[StepRecord], Any]) -> Iterable[StepRecord]:
    return {key(step): step for step in steps}.values()
