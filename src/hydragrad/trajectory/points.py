"""Where a loop stood between two batches: what it takes to go on from a stored state as if nothing had happened."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from hydragrad.files import load_tensors, reading, save_tensors
from hydragrad.trajectory.randomness import RandomState
from hydragrad.trajectory.state import Hyper


@final
@dataclass(frozen=True)
class LoaderPoint:
    """A loader: passes begun, batches ``taken`` of an open pass (None: none is open), random states.

    ``begun``: of the global generators when the open pass began; ``own``: of the loader's own generators then, or now.
    """

    passes: int
    taken: int | None
    begun: RandomState | None
    own: tuple[Tensor, ...]


@final
@dataclass(frozen=True)
class Point:
    """Where the loop stood between two batches, the state before ``step`` being stored.

    ``groups``: hyperparameters; ``random``: the global generators; ``states``: plain state_dicts of other objects.
    """

    step: int
    groups: tuple[Hyper, ...]
    random: RandomState
    loaders: tuple[LoaderPoint, ...]
    states: Mapping[str, Any]


def encode_point(point: Point) -> bytes:
    """A point as one file."""
    tensors = {f"random:{name}": state for name, state in point.random.tensors().items()}
    for place, loader in enumerate(point.loaders):
        begun = {} if loader.begun is None else loader.begun.tensors()
        tensors |= {f"begun:{place}:{name}": state for name, state in begun.items()}
        tensors |= {f"own:{place}:{k}": state for k, state in enumerate(loader.own)}
    loaders = [(loader.passes, loader.taken, len(loader.own)) for loader in point.loaders]
    states = {name: _in_pairs(state) for name, state in point.states.items()}
    return save_tensors(tensors, {"step": point.step, "groups": point.groups, "loaders": loaders, "states": states})


def decode_point(path: Path, data: bytes) -> Point:
    """Inverse of ``encode_point``."""
    tensors, tables = load_tensors(path, data)

    def random(kind: str) -> RandomState:
        found = {key.removeprefix(kind): state for key, state in tensors.items() if key.startswith(kind)}
        if any(state.dtype != torch.uint8 or state.dim() != 1 for state in found.values()):
            raise ValueError("random states that are no bytes")
        return RandomState.of(found)

    with reading(path):
        loaders = []
        for place, (passes, taken, count) in enumerate(tables["loaders"]):
            if type(passes) is not int or not (taken is None or (type(taken) is int and taken >= 0)) or passes < 0:
                raise ValueError("passes of a loader that cannot be")
            begun = random(f"begun:{place}:") if taken is not None else None
            own = tuple(tensors[f"own:{place}:{k}"] for k in range(count))
            loaders.append(LoaderPoint(passes, taken, begun, own))
        states = {name: _from_pairs(state) for name, state in tables["states"].items()}
        groups = tuple(dict(group) for group in tables["groups"])
        return Point(int(tables["step"]), groups, random("random:"), tuple(loaders), states)


def _in_pairs(value: Any) -> Any:
    """State dicts keep numbers as keys, which JSON does not."""
    if isinstance(value, dict):
        kind = "counter" if isinstance(value, Counter) else "dict"
        return {kind: [[_in_pairs(key), _in_pairs(part)] for key, part in value.items()]}
    if isinstance(value, (list, tuple)):
        return type(value)([_in_pairs(part) for part in value])
    return value


def _from_pairs(value: Any) -> Any:
    if isinstance(value, dict):
        ((kind, pairs),) = value.items()
        found = {_from_pairs(key): _from_pairs(part) for key, part in pairs}
        return Counter(found) if kind == "counter" else found
    if isinstance(value, (list, tuple)):
        return type(value)([_from_pairs(part) for part in value])
    return value
