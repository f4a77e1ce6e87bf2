"""Whether an update that was registered is the step that the optimizer takes, element by element."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.run import Run, kept_random_state
from hydragrad.step.updates import Hyper, Slots, Update
from hydragrad.trajectory.agreement import tolerance
from hydragrad.trajectory.state import State

_STEPS = 3  # from nothing, from what the first step left, and once more


def check_update(run: Run, update: Update) -> None:
    """Compare ``update`` with the first steps that the optimizer takes; raises MismatchError, UnsupportedError.

    Each parameter is given in two halves: a formula that mixes elements (a norm) gives them something else than the
    step gave the whole, as its derivative, which is taken element by element, would be something else.
    """
    if run.memo.get("update") is update:
        return
    groups = run.trajectory.manifest.optimizer["groups"]
    group_of = {name: place for place, names in enumerate(groups) for name in names}
    replayer = run.replayer(check=False)
    with kept_random_state():
        for step in run.steps[:_STEPS]:
            before = replayer.state()
            replayer.advance(step)
            after = replayer.state()
            for name, g in replayer.gradients().items():
                if name in group_of:
                    _check(name, update, before, g, after, step.groups[group_of[name]])
    run.memo["update"] = update


def _check(name: str, update: Update, before: State, g: Tensor, after: State, hyper: Hyper) -> None:
    held, left = before.optimizer.get(name, {}), after.optimizer.get(name, {})
    w, new_w = before.params[name].flatten(), after.params[name].flatten()
    try:
        slots = {slot: s.flatten() for slot, s in update.read(before.params[name], held, hyper).items()}
        halves = [_halves(update, w, slots, g.flatten(), hyper, held, part) for part in _parts(len(w))]
        found = {key: torch.cat([half[key] for half in halves]) for key in ("", *slots)}
    except Exception as error:  # a formula of the user's may fail in any way
        raise UnsupportedError(
            message(
                f"the update {type(update).__name__} cannot be taken at parameter {name!r}",
                expected="a formula of tensors, element by element, that autograd goes through and that changes "
                f"nothing in place; hyperparameters {sorted(hyper)}, state {sorted(left)}",
                got=f"{type(error).__name__}: {error}",
                remedy="see docs/optimizers.md",
            )
        ) from error
    missing = [slot for slot in slots if slot not in left]
    if missing:
        raise MismatchError(
            message(
                f"the update {type(update).__name__} names a slot {missing[0]!r}, which the optimizer does not keep",
                expected=f"of the state that it keeps of a parameter: {', '.join(sorted(left)) or 'nothing'}",
                got=", ".join(slots),
            )
        )
    taken = {"": (new_w, new_w - w), **{slot: (left[slot].flatten(), left[slot].flatten()) for slot in slots}}
    for key, (value, scale) in taken.items():
        _compare(f"{key!r} of parameter {name!r}" if key else f"parameter {name!r}", update, found[key], value, scale)


def _parts(length: int) -> list[slice]:
    return [slice(0, length // 2), slice(length // 2, length)]


def _halves(
    update: Update, w: Tensor, slots: Slots, g: Tensor, hyper: Hyper, held: Mapping[str, Tensor], part: slice
) -> dict[str, Tensor]:
    """The update of one part, under "" and the slots' names; differentiated too, to see whether that can be done."""
    w, g, slots = w[part], g[part], {slot: s[part] for slot, s in slots.items()}
    scalars = update.scalars(held)
    new_w, new_slots = update.step(w.clone(), {slot: s.clone() for slot, s in slots.items()}, g.clone(), hyper, scalars)
    linearization: Any = update.linearize(w, slots, g, hyper, scalars)
    if update.linear:  # then it is its own derivative
        new_w, new_slots = linearization.jvp(w, slots, g)
    return {"": new_w, **{slot: new_slots[slot] for slot in slots}}


def _compare(what: str, update: Update, found: Tensor, taken: Tensor, scale: Tensor) -> None:
    """Refuse what is not the step's up to rounding: of the value, and of the change that made it (``scale``)."""
    rounding = 16 * torch.finfo(taken.dtype).eps * float(taken.abs().max()) if taken.numel() else 0.0
    allowed = tolerance(taken.dtype) * float(scale.abs().max()) + rounding if taken.numel() else 0.0
    off = float((found - taken).abs().max()) if taken.numel() else 0.0
    if off <= allowed:
        return
    raise MismatchError(
        message(
            f"the update {type(update).__name__} is not the step that the optimizer takes: {what} differs",
            expected=f"the optimizer's own value, to {allowed:.1e}",
            got=f"a value {off:.1e} away from it",
            cause="another formula; one that is no map of single elements (a norm, a mean over a parameter); linear = "
            "True for one that is not linear; or a step that changes gradients in place",
            remedy="correct the formula, or register the update of this very class; see docs/optimizers.md",
        )
    )
