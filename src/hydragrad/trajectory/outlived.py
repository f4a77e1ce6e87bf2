"""Gradients that outlived their step: a loop did not zero them; a replay, whose steps begin without any, lacks them."""

from collections.abc import Collection
from typing import NamedTuple, final

from hydragrad.trajectory.state import StepRecord


@final
class Suspicion(NamedTuple):
    """What may have led a replay astray, and what to do about it."""

    cause: str
    remedy: str


def outlived(step: StepRecord, held: Collection[str]) -> Suspicion | None:
    """Whether gradients of earlier steps may have gone into this one; ``held``: the optimizer's parameters."""
    if not step.index:
        return None
    frozen = sorted(step.frozen & {*held})
    if frozen:
        return Suspicion(
            f"the gradient of {frozen[0]!r}, which is frozen, was kept from an earlier step and not zeroed, so that "
            "the optimizer went on applying it",
            "zero the gradients of frozen parameters too (optimizer.zero_grad(), or set_to_none=True before freezing)",
        )
    for clip in step.clips:
        beside = [name for name in clip.names if name not in held and name not in step.without_grad]
        if clip.kind == "norm" and beside:
            return Suspicion(
                f"the clip's norm counted the gradient of {beside[0]!r}, which the optimizer does not hold: "
                "optimizer.zero_grad() does not zero it",
                "give clip_grad_norm_ the optimizer's parameters, or call model.zero_grad()",
            )
    return None
