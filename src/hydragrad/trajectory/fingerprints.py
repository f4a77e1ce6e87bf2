"""A small fingerprint of each step's gradient: its norm, and two projections of its tensors' norms and of a sample."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import numpy as np
import torch
from torch import Tensor

from hydragrad.trajectory.digests import splitmix

_SAMPLED = 64  # coordinates that enter the projections


@final
class Reading(NamedTuple):
    """What is read of a step's gradients at once; the rest of the work can wait. Nothing: no gradient came."""

    members: tuple[int, ...]
    norms: Sequence[float] | Sequence[Tensor] = ()
    sample: Tensor = torch.zeros(0)


@final
class GradientFingerprint:
    """Norm of the gradients, and two random-sign projections of numbers read off them, float64 [3].

    The projections read the norms of all tensors, and for the signs 64 evenly strided coordinates of the last tensor
    that has so many (else of the longest): the whole forward pass and the loss go into them. The projections' signs
    come from a fixed integer hash of the places, so that recording and replay agree without a seed.
    """

    def __init__(self, numels: Sequence[int]) -> None:
        self._numels = tuple(numels)
        self._all = tuple(range(len(numels)))
        self._plans: dict[tuple[int, ...], _Plan] = {}

    def __call__(self, grads: Sequence[Tensor | None]) -> Tensor:
        """Fingerprint of ``grads``, one entry (or None) per tensor of ``numels``."""
        return self.finish([self.read(grads)])[0]

    @torch.no_grad()
    def read(self, grads: Sequence[Tensor | None]) -> Reading:
        """What has to be read before the gradients are gone; on their device, nothing is waited for."""
        present = [grad if grad.is_contiguous() else _dense(grad) for grad in grads if grad is not None]
        if not present:
            return Reading(())
        members = self._all
        if len(present) < len(members):
            members = tuple([i for i, grad in enumerate(grads) if grad is not None])
        if members not in self._plans:
            self._plans[members] = _Plan.of(members, self._numels)
        plan = self._plans[members]
        sample = present[plan.sampled].as_strided((plan.count,), (plan.stride,)).clone()
        norms = torch._foreach_norm(present)  # type: ignore[attr-defined]
        if sample.device.type == "cpu":  # a number needs a tenth of its tensor's memory
            norms = [norm.item() for norm in norms]
        return Reading(members, norms, sample)

    @torch.no_grad()
    def finish(self, readings: Sequence[Reading]) -> list[Tensor]:
        """The fingerprints of what was read, the same for each whatever it is finished together with."""
        nothing = torch.zeros(3, dtype=torch.float64)
        found = [nothing] * len(readings)
        for members in {reading.members for reading in readings if reading.members}:
            places = [k for k, reading in enumerate(readings) if reading.members == members]
            norms = _rows([readings[k].norms for k in places])
            samples = torch.stack([readings[k].sample for k in places])
            for k, row in zip(places, self._plans[members].fingerprints(norms, samples), strict=True):
                found[k] = row
        return found


@final
@dataclass(frozen=True)
class _Plan:
    """For the tensors that have a gradient: which of them is sampled and how, and plus and minus one [2, numbers]."""

    sampled: int
    count: int
    stride: int
    signs: np.ndarray

    @staticmethod
    def of(members: Sequence[int], numels: Sequence[int]) -> "_Plan":
        sampled = max(range(len(members)), key=lambda k: (min(numels[members[k]], _SAMPLED), k))
        numel = numels[members[sampled]]
        count = min(numel, _SAMPLED)
        signs = [splitmix(i << 32, 2).view(2, 1) for i in members]
        signs += [splitmix((members[sampled] << 32) + 2, 2 * count).view(2, -1)]
        plus = torch.cat(signs, 1).ge(0).double() * 2 - 1
        return _Plan(sampled, count, max(1, numel // _SAMPLED), plus.numpy())

    def fingerprints(self, norms: Tensor, samples: Tensor) -> Tensor:
        """[n, 3] of norms [n, tensors] and samples [n, coordinates]: row by row, so that n changes no rounding."""
        plain = torch.cat([norms.double(), samples.double()], 1).cpu().numpy()
        total = np.sqrt((plain[:, : norms.shape[1]] ** 2).sum(1))
        projections = [(plain * signs).sum(1) for signs in self.signs]
        return torch.from_numpy(np.stack([total, *projections], 1))


def _rows(norms: Sequence[Any]) -> Tensor:
    """Numbers, or tensors of one number each, [n, tensors]."""
    if isinstance(norms[0][0], float):
        return torch.tensor(norms, dtype=torch.float64)
    return torch.stack([norm for row in norms for norm in row]).reshape(len(norms), -1)


def _dense(grad: Tensor) -> Tensor:
    """Row by row in memory."""
    grad = grad if grad.layout == torch.strided else grad.to_dense()
    return grad if grad.is_contiguous() else grad.contiguous()
