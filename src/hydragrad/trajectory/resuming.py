"""Going on with a recording whose process died: what a loop stood at, kept beside states, found again and put back."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.optim import Optimizer

from hydragrad.errors import MismatchError, StoreError, message
from hydragrad.trajectory.agreement import state_difference
from hydragrad.trajectory.format import MANIFEST
from hydragrad.trajectory.hyper import as_held
from hydragrad.trajectory.optimizers import restore_optimizer
from hydragrad.trajectory.points import Point
from hydragrad.trajectory.randomness import RandomState
from hydragrad.trajectory.state import Manifest, State
from hydragrad.trajectory.store import Trajectory


@final
@dataclass(frozen=True)
class Resumption:
    """Where a recording goes on: before step ``step``, in pass ``epoch`` over its first loader.

    ``batch``: batches of that pass that were trained on already; ``recording.batches`` passes them by. ``dropped``:
    recorded steps after ``step``, which are taken again. All 0: a new run.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    dropped: int = 0


def can_go_on(folder: Path) -> Trajectory | None:
    """The run in ``folder`` to go on with; None: there is none yet. Refused if it is finished."""
    if not (folder / MANIFEST).exists():
        return None
    trajectory = Trajectory(folder)
    if trajectory.complete:
        raise StoreError(
            message(
                f"the run in {folder} is finished",
                expected="a run whose process was killed, or whose loop raised",
                got=f"a whole run of {len(trajectory)} steps",
                remedy="load it with hydragrad.load, or record another run into another folder",
            )
        )
    return trajectory


def last_point(trajectory: Trajectory) -> Point:
    """The latest point whose state is stored; refused if there is none."""
    steps = [step for step in trajectory.points if step in trajectory.checkpoints]
    if not steps:
        raise StoreError(
            message(
                f"{trajectory.folder} does not say where its loop stood",
                expected="a run recorded with hydragrad.record(..., resume=True) from its beginning",
                got=f"{len(trajectory)} steps, stored states {list(trajectory.checkpoints)[-4:]}",
                cause="it was recorded without resume=True, or killed before its first stored state was complete",
                remedy="begin again with overwrite=True and resume=True",
            )
        )
    return trajectory.point(steps[-1])


def matching_point(trajectory: Trajectory, live: State) -> Point:
    """The latest point at whose state model and optimizer stand; refused if there is none."""
    nearest = (float("inf"), -1)
    for step in sorted(set(trajectory.points) & set(trajectory.checkpoints), reverse=True):
        stored = trajectory.state(step)
        apart = _apart(stored, live)
        if apart == 0.0:
            return trajectory.point(step)
        nearest = min(nearest, (apart, step))
    raise MismatchError(
        message(
            f"model and optimizer stand at no stored state of the run in {trajectory.folder}",
            expected=f"the state at one of steps {sorted(set(trajectory.points) & set(trajectory.checkpoints))[-6:]}",
            got=f"a state that is nearest to that of step {nearest[1]}, off by {nearest[0]:.2g} relative"
            if nearest[1] >= 0
            else "no stored state to go on from",
            cause="another checkpoint than one of this run's, or a fresh model",
            remedy="call recording.restore() first, which puts back the last stored state",
        )
    )


def _apart(stored: State, live: State) -> float:
    if {name: set(slots) for name, slots in stored.optimizer.items()} != {
        name: set(slots) for name, slots in live.optimizer.items()
    }:
        return float("inf")
    return state_difference(stored, live)


def check_same(given: Manifest, recorded: Manifest, but: tuple[str, ...] = ()) -> None:
    """Refuse to go on with another model, optimizer, data or way of recording than the run was begun with."""
    for field in fields(Manifest):
        if field.name in ("version", "torch", "modes", "extra", "device", "batch", *but):
            continue
        now, then = getattr(given, field.name), getattr(recorded, field.name)
        if field.name == "params":  # which of them train may have changed
            now, then = ({n: {**s, "requires_grad": None} for n, s in specs.items()} for specs in (now, then))
        if now != then:
            differing = sorted(set(now) ^ set(then)) if isinstance(now, dict) and set(now) != set(then) else []
            raise MismatchError(
                message(
                    f"{field.name} differs from that of the run to go on with",
                    expected=str(differing or then)[:200],
                    got=str(now)[:200],
                    cause="another model, optimizer, data set or argument of hydragrad.record",
                    remedy="give what was given when the run began, or record a new run into another folder",
                )
            )


@torch.no_grad()
def put_back(
    point: Point,
    state: State,
    params: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    optimizer: Optimizer,
    states: Mapping[str, Any],
) -> None:
    """Bring model, optimizer and other objects to a stored state, and the global generators to where they stood."""
    for live, stored in ((params, state.params), (buffers, state.buffers)):
        for name, tensor in live.items():
            tensor.copy_(stored[name])
    device = next((param.device for param in params.values()), torch.device("cpu"))
    restore_optimizer(optimizer, state.optimizer, params)
    for param in params.values():
        param.grad = None
    for group, hyper in zip(optimizer.param_groups, point.groups, strict=True):
        for key, value in as_held(hyper, device).items():
            if isinstance(group.get(key), Tensor):
                group[key].copy_(torch.as_tensor(value))
            else:
                group[key] = value
    if set(states) != set(point.states):
        raise MismatchError(
            message(
                "other objects are to be put back than were kept",
                expected=f"states={sorted(point.states)}",
                got=f"states={sorted(states)}",
                remedy="give hydragrad.record the states= of the run that is gone on with",
            )
        )
    for name, one in states.items():
        one.load_state_dict(point.states[name])
    if point.step:
        optimizer._opt_called = True  # type: ignore[attr-defined]  # schedulers warn where no step came before theirs
    RandomState.of(point.random.tensors(), device).set()
