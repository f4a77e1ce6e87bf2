"""Gradient clipping between backward and step: torch's own functions, and the same as pure maps with derivatives."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from hydragrad.shapes import in_rows

_EPS = 1e-6
"""In the denominator of torch's clip_grad_norm_."""


@final
@dataclass(frozen=True)
class Clip:
    """One call of a clipping function: on which parameters, with which arguments.

    ``kind`` "norm": g <- min(1, limit / (||g||_p + 1e-6)) g over all of ``names`` together, p = ``norm_type``;
    "value": every element clamped to [-limit, limit].
    """

    kind: str
    names: tuple[str, ...]
    limit: float
    norm_type: float = 2.0
    foreach: bool | None = None

    def apply_(self, params: Mapping[str, Tensor]) -> None:
        """Clip the gradients in place by the very function that training called."""
        chosen = [params[name] for name in self.names]
        if self.kind == "norm":
            nn.utils.clip_grad_norm_(chosen, self.limit, self.norm_type, foreach=self.foreach)
        else:
            nn.utils.clip_grad_value_(chosen, self.limit, foreach=self.foreach)

    def linearize(self, gradient: Mapping[str, Tensor]) -> "ClipMap":
        """The clip of this gradient (by parameter name; absent: no gradient came), and its derivative there."""
        names = [name for name in self.names if name in gradient]
        if self.kind == "value":
            inside = {name: gradient[name].abs() <= self.limit for name in names}
            clipped = {name: gradient[name].clamp(-self.limit, self.limit) for name in names}
            return ClipMap({**gradient, **clipped}, inside=inside)
        norm, slope = _norm_with_slope([gradient[name] for name in names], self.norm_type)
        scale = self.limit / (norm + _EPS)
        if not names or bool(scale > 1.0):  # at 1 torch's clamp passes the derivative
            return ClipMap(dict(gradient))
        clipped = {name: gradient[name] * scale for name in names}
        # d(scale g) = scale dg - (scale / (norm + eps)) <slope, dg> g
        directions = {
            name: (gradient[name], s * (-scale / (norm + _EPS))) for name, s in zip(names, slope, strict=True)
        }
        return ClipMap({**gradient, **clipped}, scale=scale, directions=directions)


@final
@dataclass(frozen=True)
class ClipMap:
    """A clip at one gradient: the clipped gradient, and the derivative: diag(inside), or scale (1 + g slope^T)."""

    clipped: dict[str, Tensor]
    inside: Mapping[str, Tensor] | None = None
    scale: Tensor | None = None
    directions: Mapping[str, tuple[Tensor, Tensor]] | None = None

    def pull_(self, block: Mapping[str, Tensor]) -> None:
        """VJP in place: gam with respect to the clipped gradient, ``[K, *shape]`` by name, to that of the raw one."""
        self._apply_(block, along=0, onto=1)

    def push_(self, block: Mapping[str, Tensor]) -> None:
        """JVP in place: tangents of the raw gradient to those of the clipped one."""
        self._apply_(block, along=1, onto=0)

    def _apply_(self, block: Mapping[str, Tensor], along: int, onto: int) -> None:
        for name, mask in (self.inside or {}).items():
            block[name].mul_(mask)
        if self.directions is None:
            return
        assert self.scale is not None
        total: Any = 0.0
        for name, pair in self.directions.items():
            total = total + in_rows(block[name]) @ pair[along].flatten()
        for name, pair in self.directions.items():
            x = block[name]
            x.mul_(self.scale).add_(total.view(-1, *[1] * (x.dim() - 1)) * pair[onto])


@final
class Clipping:
    """All clips of one step, in order, linearised at its raw gradient. ``clipped``: what the optimizer saw.

    ``names``: the optimizer's parameters, whose gradients alone matter; ``constant``: those whose gradient is no
    function of the parameters at this step (frozen, their gradient kept as zeros): the update uses it, nothing flows
    through it.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        gradient: Mapping[str, Tensor],
        names: Sequence[str],
        constant: Collection[str] = (),
    ) -> None:
        self._names = tuple(names)
        self._constant = [place for place, name in enumerate(names) if name in constant] if constant else []
        self._maps: list[ClipMap] = []
        gradient = {name: gradient[name] for name in names if name in gradient}
        for clip in clips:
            self._maps.append(clip.linearize(gradient))
            gradient = self._maps[-1].clipped
        self.clipped = gradient

    def pull_(self, gam: Sequence[Tensor]) -> None:
        """VJP in place, blocks ``[K, *shape]`` in the order of ``names``."""
        for step in reversed(self._maps):
            step.pull_(dict(zip(self._names, gam, strict=True)))
        self._still_(gam)

    def push_(self, dg: Sequence[Tensor]) -> None:
        """JVP in place."""
        self._still_(dg)
        for step in self._maps:
            step.push_(dict(zip(self._names, dg, strict=True)))

    def _still_(self, block: Sequence[Tensor]) -> None:
        for place in self._constant:
            block[place].zero_()


def _norm_with_slope(gradients: Sequence[Tensor], order: float) -> tuple[Tensor, Sequence[Tensor]]:
    """||g||_p over all of them as torch computes it (the norm of their norms), and its gradient."""
    if not gradients:
        return torch.tensor(0.0), []
    with torch.enable_grad():
        leaves = [g.detach().requires_grad_() for g in gradients]
        total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g, order) for g in leaves]), order)
        slope = torch.autograd.grad(total, leaves)
    return total.detach(), slope
