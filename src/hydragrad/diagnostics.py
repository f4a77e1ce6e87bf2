"""What an attribution says about itself: its cost, and whether its scores can be believed."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, final

Verdict = Literal["reliable", "doubtful", "meaningless", "unchecked"]


@final
@dataclass(frozen=True)
class Rung:
    """One step of the finite-difference ladder: weights 1 - h and 1 + h on a few examples, really retrained.

    ``step`` h; ``error`` |measured - predicted| / |measured| over all queries; ``correlation`` of the two over the
    queries (NaN for fewer than three).
    """

    step: float
    error: float
    correlation: float


@final
@dataclass(frozen=True)
class Diagnostics:
    """Cost, drift, growth and the finite-difference check of one attribution.

    ``seconds`` of the whole call; ``check_seconds`` of the checks in it; ``replay_seconds``: one plain replay of the
    run, estimated from one step; ``ratio``: (seconds - check_seconds) / replay_seconds; ``drift``: largest relative
    difference between the replay and a recorded checkpoint (0: bit for bit); ``growth``: largest ||lam_t|| / ||lam_T||
    of any query at any step; ``plan``: what was chosen and why; ``ladder``: finite differences by retraining, step by
    step, ``examples`` the ones they reweighted, ``seed`` their seed; ``derivative_error``: of torch's derivatives of
    the model against finite differences on one batch, in float64 (None: not checked, or the model does not run so);
    ``gradient_gap``: relative difference between the gradient of the loss as it is differentiated and the training
    step's, on one batch (rounding; more is refused);
    ``verdict`` and ``reasons``: whether first-order scores are reliable for this run, in words.
    """

    method: str
    seconds: float
    check_seconds: float
    replay_seconds: float
    drift: float
    growth: float
    plan: str
    verdict: Verdict = "unchecked"
    reasons: tuple[str, ...] = ()
    ladder: tuple[Rung, ...] = ()
    examples: tuple[int, ...] = ()
    seed: int = 0
    derivative_error: float | None = None
    gradient_gap: float | None = None

    @property
    def ratio(self) -> float:
        """Cost in replays of the run, the check not counted."""
        return (self.seconds - self.check_seconds) / self.replay_seconds if self.replay_seconds else float("nan")

    @property
    def finite_difference_error(self) -> float:
        """The relative error at the top of the ladder: a few examples really removed. NaN if not checked."""
        return self.ladder[-1].error if self.ladder else float("nan")

    def __str__(self) -> str:
        gap = "" if self.gradient_gap is None else f", gradient gap {self.gradient_gap:.1e}"
        lines = [
            f"{self.method}: {self.verdict}",
            f"  {self.seconds:.1f} s, {self.ratio:.1f} times one replay; check {self.check_seconds:.1f} s",
            f"  replay drift {self.drift:.1e}, adjoint growth {self.growth:.1f}{gap}",
            f"  plan: {self.plan}",
        ]
        lines += [
            f"  weights 1 +- {r.step:g}: error {r.error:.3f}, correlation {r.correlation:.2f}" for r in self.ladder
        ]
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    @staticmethod
    def from_dict(values: Mapping[str, Any]) -> "Diagnostics":
        """Inverse of ``to_dict``; unknown fields of later versions are ignored."""
        known = {f.name for f in fields(Diagnostics)}
        given = {key: value for key, value in values.items() if key in known}
        given["ladder"] = tuple(Rung(**rung) for rung in given.get("ladder", ()))
        given["reasons"] = tuple(given.get("reasons", ()))
        given["examples"] = tuple(given.get("examples", ()))
        return Diagnostics(**given)
