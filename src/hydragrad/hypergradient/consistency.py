"""Whether the objective that sweeps differentiate is the training step that was taken."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.step.objective import Objective, Point
from hydragrad.trajectory.agreement import tolerance

HALF_PRECISION = 0.05
"""Gap up to which steps taken under autocast are differentiated, unless told otherwise (``drift_tolerance``).

bfloat16 rounds to 0.4 %, and the gradients of small networks came out 0.2 to 2 % apart; 5 % is another function."""


def gradient_gap(
    objective: Objective, points: Sequence[Point], gradient: Mapping[str, Tensor], limit: float | None = None
) -> float:
    """||g' - g|| / ||g||: the objective's gradient g', summed over a step's micro-batches, against the replayed one.

    ``gradient``: by parameter name, absent where none came from the loss; ``limit``: what is more than rounding (None:
    by dtype; half precision needs a wider one). Raises MismatchError above it: derivatives of another function would be
    worthless.
    """
    total = [torch.zeros_like(p) for p in points[0].params]
    with objective.differentiable(), torch.enable_grad():
        for point in points:
            params = tuple(p.detach().requires_grad_() for p in point.params)
            scalar = objective.scalar(
                point, params, point.carried, point.weights, tuple(map(torch.zeros_like, point.carried))
            )
            for held, g in zip(total, torch.autograd.grad(scalar, params, materialize_grads=True), strict=True):
                held += g
    # where no gradient came (a layer frozen at this step) there is nothing to compare
    total = [held for name, held in zip(objective.names, total, strict=True) if name in gradient]
    taken = [gradient[name] for name in objective.names if name in gradient]
    apart = _norm([a - b for a, b in zip(total, taken, strict=True)])
    norm = _norm(taken)
    gap = apart / norm if norm else apart
    limit = max(tolerance(p.dtype) for p in points[0].params) if limit is None else limit
    if norm == norm and norm < float("inf") and not gap <= limit:  # a run that is not finite is named as that elsewhere
        drawn = any(point.draws for point in points)
        raise MismatchError(
            message(
                "the gradient of the loss as it is differentiated here is not the gradient of the training step",
                expected=f"norm {norm:.6g}, equal to {limit:g} of it",
                got=f"norm {_norm(total):.6g}, {gap:.2g} of it apart",
                cause="random numbers that cannot be handed out again (dropout inside a fused attention or recurrent "
                "kernel), drawn outside of torch, or by a loss that draws differently from call to call"
                if drawn
                else "a layer whose form for derivatives differs from its kernel, a step that draws random numbers "
                "torch does not know of, or autocast",
                remedy="train with unfused attention (torch.nn.attention.sdpa_kernel(SDPBackend.MATH)) or without that "
                "dropout"
                if drawn
                else "find the layer by training without one after the other for a step, and report it; where it is "
                f"autocast's rounding, insist with drift_tolerance={_above(gap):g} or more",
            )
        )
    return gap


_ROUNDINGS = 64
"""A buffer's own roundings that may lie between two ways of computing it: sums over the batch in another order."""


def check_buffers(
    objective: Objective,
    last: Point,
    before: Mapping[str, Tensor],
    left: Mapping[str, Tensor],
    limit: float | None,
    half: torch.dtype | None,
) -> None:
    """Refuse a step that left other buffers than the forward passes which are differentiated leave.

    ``last``: the point of the pass that was run last; ``before``, ``left``: all buffers by name around the step;
    ``limit``: what is more than rounding, of how far a buffer moved (None: by dtype); ``half``: the dtype of autocast.
    """
    carried, rest = objective.after(last)
    after = {**dict(zip(objective.carried, carried, strict=True)), **{name: rest[name] for name in objective.counters}}
    for name, found in after.items():
        was, taken = before[name].to(found.device), left[name].to(found.device)
        if not taken.is_floating_point():
            if not torch.equal(found, taken):
                raise UnsupportedError(_other_buffer(name, f"{taken.flatten()[:4].tolist()}", "another value"))
            continue
        apart, moved, size = _norm([found - taken]), _norm([taken - was]), _norm([taken])
        allowed = (tolerance(taken.dtype) if limit is None else limit) * moved
        allowed += max(_ROUNDINGS * torch.finfo(taken.dtype).eps, torch.finfo(half).eps if half else 0.0) * size
        if size < float("inf") and not apart <= allowed:  # a run that is not finite is named as that elsewhere
            raise UnsupportedError(_other_buffer(name, f"moved by {moved:.3g}", f"{apart:.3g} away from it"))


def _other_buffer(name: str, expected: str, got: str) -> str:
    return message(
        f"the training step left another buffer {name!r} than its forward pass does",
        expected=f"{expected}, as the step left it",
        got=f"{got}, from the forward passes of its batches alone",
        cause="activation checkpointing (torch.utils.checkpoint) around BatchNorm, which is run again in the backward "
        "pass and counts the batch twice; or a module that updates buffers elsewhere than in its forward pass (a "
        "hook, a moving average of the parameters)",
        remedy="keep BatchNorm outside of the checkpointed part, or train without checkpointing; update buffers in "
        "forward()",
    )


def _above(gap: float) -> float:
    """The gap to two digits, never below it: what is advised must do."""
    power = 10.0 ** (math.floor(math.log10(gap)) - 1)
    return float(f"{math.ceil(gap / power) * power:.2g}")


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(torch.stack([x.double().norm() for x in tensors]).norm()) if tensors else 0.0
