"""How far what is replayed is from what was recorded."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hydragrad.trajectory.state import State, StepRecord

# Rounding of a loss that is written in another way (a mean inside cross_entropy) stays far below these.
_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3}


def tolerance(dtype: torch.dtype) -> float:
    """Relative difference above which two gradients are not the same computation."""
    return _TOLERANCE.get(dtype, 5e-2)


def gradient_difference(recorded: Tensor, replayed: Tensor) -> float:
    """Largest difference of two fingerprints, relative to the recorded gradient's norm; 0.0 if equal bit for bit."""
    a, b = recorded.to("cpu", torch.float64), replayed.to("cpu", torch.float64)
    apart = (a != b) & ~(a.isnan() & b.isnan())
    if not bool(apart.any()):
        return 0.0
    difference = float((a - b)[apart].abs().max())
    norm = float(a[0])
    return difference / norm if norm > 0 and difference == difference else float("inf")


def contents(steps: Sequence[StepRecord], count: int) -> tuple[Tensor, Tensor]:
    """The digest of each of ``count`` examples, int64 [N], and of which it is known and always the same, bool [N]."""
    pairs = [pair for step in steps for pair in zip(step.batches, step.digests, strict=True) if pair[1] is not None]
    known, told = torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.bool)
    if pairs:
        ids, digests = (torch.cat(parts).cpu() for parts in zip(*pairs, strict=True))
        known[ids], told[ids] = digests, True
        told[ids[known[ids] != digests]] = False
    return known, told


def state_difference(recorded: State, replayed: State) -> float:
    """Largest over all tensors of max |a - b| / max |a|; 0.0 only if all are equal bit for bit."""
    return farthest(recorded, replayed)[0]


def farthest(recorded: State, replayed: State) -> tuple[float, str, str]:
    """The largest difference, and the kind and name of the tensor that has it."""
    if recorded.optimizer.keys() != replayed.optimizer.keys():
        names = sorted(recorded.optimizer.keys() ^ replayed.optimizer.keys())
        return float("inf"), "the optimizer's state of parameter", names[0]
    pairs = [("parameter", recorded.params, replayed.params), ("buffer", recorded.buffers, replayed.buffers)]
    found = [(_difference(a[name], b[name]), kind, name) for kind, a, b in pairs for name in a]
    for name, kept in recorded.optimizer.items():
        found += [
            (_difference(kept[key], replayed.optimizer[name][key]), "the optimizer's state of parameter", name)
            for key in kept
        ]
    return max(found, key=lambda one: one[0], default=(0.0, "", ""))


def _difference(a: Tensor, b: Tensor) -> float:
    b = b.to(a.device)
    if torch.equal(a, b):
        return 0.0
    a, b = (t.to(torch.complex128 if t.is_complex() else torch.float64) for t in (a, b))
    if bool((a.isnan() == b.isnan()).all()) and bool((a.isnan() | (a == b)).all()):
        return 0.0
    gap, scale = float((a - b).abs().max()), float(a.abs().max())
    return gap / scale if scale > 0 and gap == gap else float("inf")
