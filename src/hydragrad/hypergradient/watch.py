"""What is watched while a sweep lasts."""

from collections.abc import Mapping, Sequence
from typing import final

from torch import Tensor
from tqdm import tqdm

from hydragrad.errors import NonFiniteError, message
from hydragrad.hypergradient.finite import FirstBad
from hydragrad.hypergradient.reverse import Adjoint, Direction

_LOOKED_AT_ALWAYS = 2**21
"""Numbers of adjoints up to which every step is looked at; a pass over more costs, and fifty times a sweep it is."""


def looked_at_always(adjoint: Adjoint | Direction) -> bool:
    """Whether it is small enough to be looked at after every step."""
    return sum(x.numel() for x in adjoint.parts() if isinstance(x, Tensor)) <= _LOOKED_AT_ALWAYS


@final
class Watch:
    """Follows a sweep: its bar, how far the adjoint grows, and whether it stays finite."""

    def __init__(self, steps: int, sweeps: int, names: Sequence[str], progress: bool) -> None:
        self._bad = FirstBad(names)
        self.every = max(1, steps // 50)
        self.growths, self.drift = dict[int, float](), dict[int, float]()
        self.bar = tqdm(total=steps * sweeps, desc="sweeping back", unit="step", delay=2, disable=not progress)
        self._first: Tensor | None = None
        self._small = True

    @property
    def growth(self) -> float:
        """The largest of all."""
        return max(self.growths.values(), default=0.0)

    def begin(self, adjoint: Adjoint | Direction) -> None:
        self._first = adjoint.norms()
        self._small = looked_at_always(adjoint)

    def skip(self, steps: int, growths: Mapping[int, float], drift: Mapping[int, float]) -> None:
        """A piece was finished by an earlier call, which saw this."""
        self.bar.update(steps)
        for step, value in growths.items():
            self.growths[step] = max(self.growths.get(step, 0.0), value)
        self.drifted(drift)

    def drifted(self, drift: Mapping[int, float]) -> None:
        """How far a replay ended from checkpoints, by step; where a sweep came by before, the larger counts."""
        for step, value in drift.items():
            self.drift[step] = max(self.drift.get(step, 0.0), value)

    def __call__(self, step: int, adjoint: Adjoint | Direction) -> None:
        self.bar.update()
        looked_at = not step % self.every
        if looked_at or self._small:
            self._bad.see(step, adjoint.parts())
        if not looked_at:
            return
        assert self._first is not None
        if found := self._bad.first():
            at, names = found
            raise NonFiniteError(
                message(
                    f"the adjoint is not finite at step {at}, first in parameter {names[0]!r}",
                    expected="finite derivatives back to the first step",
                    got=f"NaN or infinity in {len(names)} of {len(adjoint.parts())} parameters",
                    cause="an unstable run: its derivative grows at every step back",
                    remedy="try method='gauss-newton' or 'hessian-free', or ask an earlier step with step=",
                )
            )
        growth = float((adjoint.norms() / self._first.clamp_min(1e-30)).max())
        self.growths[step] = max(self.growths.get(step, 0.0), growth)
