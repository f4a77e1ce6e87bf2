"""A small fingerprint of each step's gradient: its norm, and two projections of a sample of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from hydragrad.trajectory.digests import splitmix

_SAMPLED = 64  # coordinates of a tensor that enter the projections
_TENSORS = 4  # of which that many are taken


@final
class Reading(NamedTuple):
    """What is read of a step's gradients at once; the rest of the work can wait. Nothing: no gradient came."""

    members: tuple[int, ...]
    norms: tuple[Tensor, ...] = ()
    sample: Tensor = torch.zeros(0)


@final
class GradientFingerprint:
    """Norm of the gradients, and two random-sign projections of a part of them, float64 [3].

    The projections read at most 64 evenly strided coordinates of each of four tensors, the last of those that have a
    gradient among them (the whole forward pass and the loss go into it), and the norms of all tensors. Signs come from
    a fixed integer hash of the places, so that recording and replay agree without a seed.
    """

    def __init__(self, numels: Sequence[int]) -> None:
        counts = [min(numel, _SAMPLED) for numel in numels]
        self._strides = [((count,), (max(1, numel // _SAMPLED),)) for count, numel in zip(counts, numels, strict=True)]
        self._all = tuple(range(len(counts)))
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def __call__(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Fingerprint of ``grads``, one entry (or None) per tensor of ``numels``."""
        return self.finish([self.read(grads)])[0]

    @torch.no_grad()
    def read(self, grads: Sequence[Tensor | None]) -> Reading:
        """What has to be read before the gradients are gone; on their device, nothing is waited for."""
        present = [_dense(grad) for grad in grads if grad is not None]
        if not present:
            return Reading(())
        members = self._all
        if len(present) < len(members):
            members = tuple([i for i, grad in enumerate(grads) if grad is not None])
        if members not in self._plans:
            self._plans[members] = _Plan.of(members, self._strides)
        sample = torch.cat([present[k].as_strided(*few) for k, few in self._plans[members].taken])
        return Reading(members, tuple(torch._foreach_norm(present)), sample)  # type: ignore[attr-defined]

    @torch.no_grad()
    def finish(self, readings: Sequence[Reading]) -> list[Tensor]:
        """The fingerprints of what was read, the same for each whatever it is finished together with."""
        found = [torch.zeros(3, dtype=torch.float64) for _ in readings]
        for members in {reading.members for reading in readings if reading.members}:
            places = [k for k, reading in enumerate(readings) if reading.members == members]
            norms = torch.stack([norm for k in places for norm in readings[k].norms]).reshape(len(places), -1)
            samples = torch.stack([readings[k].sample for k in places])
            for k, row in zip(places, self._plans[members].fingerprints(norms, samples), strict=True):
                found[k] = row
        return found


@final
@dataclass(frozen=True)
class _Plan:
    """For the tensors that have a gradient: which of them are sampled and how, and plus and minus one [2, numbers]."""

    taken: tuple[tuple[int, Any], ...]
    signs: np.ndarray

    @staticmethod
    def of(members: Sequence[int], strides: Sequence[Any]) -> "_Plan":
        count = min(_TENSORS, len(members))
        taken = [len(members) - 1 - k * len(members) // count for k in range(count)]
        numbers = [strides[members[k]][0][0] for k in taken]
        signs = [splitmix(i << 32, 2).view(2, 1) for i in members]
        signs += [splitmix((members[k] << 32) + 2, 2 * n).view(2, -1) for k, n in zip(taken, numbers, strict=True)]
        plus = torch.cat(signs, 1).ge(0).double() * 2 - 1
        return _Plan(tuple((k, strides[members[k]]) for k in taken), plus.numpy())

    def fingerprints(self, norms: Tensor, samples: Tensor) -> Tensor:
        """[n, 3] of norms [n, tensors] and samples [n, coordinates]: row by row, so that n changes no rounding."""
        plain = torch.cat([norms.double(), samples.double()], 1).cpu().numpy()
        total = np.sqrt((plain[:, : norms.shape[1]] ** 2).sum(1))
        projections = [(plain * signs).sum(1) for signs in self.signs]
        return torch.from_numpy(np.stack([total, *projections], 1))


def _dense(grad: Tensor) -> Tensor:
    """Row by row in memory."""
    grad = grad if grad.layout == torch.strided else grad.to_dense()
    return grad if grad.is_contiguous() else grad.contiguous()
