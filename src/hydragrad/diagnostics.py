"""What an attribution says about itself: its cost, and whether its scores can be believed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, final

Verdict = Literal["reliable", "doubtful", "meaningless", "unchecked"]


@final
@dataclass(frozen=True)
class Rung:
    """One step of the finite-difference ladder: weights 1 - h and 1 + h on a few examples, really retrained.

    ``step`` h; ``error`` |measured - predicted| / |measured| over all queries, of the central difference;
    ``correlation`` of the two over the queries (NaN for fewer than three); ``remainder``: what each side alone is off
    from the prediction, relative to it: |m(1 -+ h) - m(1) -+ h S| / |h S|, both sides together.
    """

    step: float
    error: float
    correlation: float
    remainder: float = float("nan")


@final
@dataclass(frozen=True)
class Range:
    """How far weights may move before the first-order prediction is off by more than ``limit`` (relative to it).

    ``step`` h, estimated: ``examples`` many reweighted together, within 1 - h and 1 + h; it lies between ``low``, the
    largest step tried that held (0: none), and ``high``, the smallest that did not (infinity: none).
    """

    step: float
    low: float
    high: float
    examples: int
    limit: float

    @property
    def removals(self) -> float:
        """About as many of them removed at once: h n, for n examples reweighted by h are that much weight in all."""
        return self.step * self.examples

    def __str__(self) -> str:
        many = f"weights of {self.examples} examples changed by"
        if self.low == 0.0:
            return f"first-order scores do not even hold for {many} {self.high:g} (off by more than {self.limit:.0%})"
        words = "at least" if self.high == float("inf") else "about"
        count = f"{self.removals:.0f}" if self.removals >= 3 else f"{self.removals:.2g}"
        plural = "example" if count == "1" else "examples"
        return (
            f"first-order scores hold for removing {words} {count} {plural} at once "
            f"({many} up to {self.step:.2g}: off by at most {self.limit:.0%})"
        )


@final
@dataclass(frozen=True)
class Smoothing:
    """What smoothed scores are means over, and what retraining without other parts of that size says of them.

    ``runs`` R, each without a random ``fraction`` of the examples; ``spread``: relative standard error of the mean over
    them; ``subsets`` retrained, with relative ``error`` and ``correlation`` of predicted and actual changes of the
    queries, both centred over the subsets (NaN: not checked); ``failure``: why a subset could not be compared.
    """

    runs: int
    fraction: float
    spread: float
    subsets: int = 0
    error: float = float("nan")
    correlation: float = float("nan")
    failure: str = ""


@final
@dataclass(frozen=True)
class Diagnostics:
    """Cost, drift, growth and the finite-difference check of one attribution.

    ``seconds`` of the whole call; ``check_seconds`` of the checks in it; ``replay_seconds``: one plain replay of the
    run, estimated from one step; ``ratio``: (seconds - check_seconds) / replay_seconds; ``drift``: largest relative
    difference between the replay and a recorded checkpoint (0: bit for bit); ``growth``: largest ||lam_t|| / ||lam_T||
    of any query at any step; ``plan``: what was chosen and why; ``ladder``: finite differences by retraining, step by
    step, ``examples`` the ones they reweighted, ``seed`` their seed; ``derivative_error``: of torch's derivatives of
    the model against finite differences on a few batches, in float64, without ``check`` too (None: it does not run so);
    ``measurement_error``: of torch's slopes of the measurement likewise, on a few queries (None: it draws random
    numbers);
    ``gradient_gap``: relative difference between the gradient of the loss as it is differentiated and the training
    step's, on one batch (rounding; more is refused);
    ``growth_by_step``: (step, growth) at some fifty steps, first to last; ``drift_by_checkpoint``: (step, drift) of
    every checkpoint that the replay came by; ``range``: how far weights may move for the scores to hold (None: not
    checked); ``nondeterminism``: what differs when a step is repeated, in words (empty: nothing, or nothing drifted);
    ``smoothing``: the runs that smoothed scores are means over, drawn under ``seed`` (None: not smoothed);
    ``half_precision``: the dtype of autocast in training (empty: none): the replay follows it, the sweep is in full
    precision, and ``gradient_gap`` says how far apart the two are;
    ``verdict`` and ``reasons``: whether first-order scores are reliable for this run, in words; ``summary`` is a
    sentence of both.
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
    growth_by_step: tuple[tuple[int, float], ...] = ()
    drift_by_checkpoint: tuple[tuple[int, float], ...] = ()
    range: Range | None = None
    nondeterminism: str = ""
    half_precision: str = ""
    smoothing: Smoothing | None = None
    measurement_error: float | None = None

    @property
    def summary(self) -> str:
        """The verdict as a sentence: first-order scores are ... here, because ..."""
        because = "; ".join(self.reasons) or "nothing was retrained to compare with (check=False)"
        return f"first-order scores are {self.verdict} here, because {because}"

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
        if (found := self.smoothing) is not None:
            lines.append(
                f"  mean over {found.runs} runs without {found.fraction:g} of the examples each "
                f"(seed {self.seed}); relative standard error {found.spread:.2f}"
            )
            if found.subsets:
                lines.append(
                    f"  {found.subsets} other subsets removed: error {found.error:.2f}, "
                    f"correlation {found.correlation:.2f}"
                )
        lines += [
            f"  weights 1 +- {r.step:g}: error {r.error:.3f}, correlation {r.correlation:.2f}" for r in self.ladder
        ]
        if self.half_precision:
            lines.append(
                f"  trained under autocast ({self.half_precision}), differentiated in full precision: gradients "
                f"{self.gradient_gap or 0.0:.1%} apart on one batch"
            )
        if self.range is not None:
            lines.append(f"  {self.range}")
        if self.drift:
            lines.append("  drift by checkpoint: " + _sampled(self.drift_by_checkpoint, "{:.1e}"))
        if self.growth_by_step and self.growth > 10:
            lines.append("  growth by step: " + _sampled(self.growth_by_step, "{:.2g}"))
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
        for name in ("growth_by_step", "drift_by_checkpoint"):
            given[name] = tuple((step, value) for step, value in given.get(name, ()))
        if given.get("smoothing") is not None:
            given["smoothing"] = Smoothing(**given["smoothing"])
        if given.get("range") is not None:
            given["range"] = Range(**given["range"])
        return Diagnostics(**given)


def _sampled(pairs: Sequence[tuple[int, float]], form: str, most: int = 8) -> str:
    """At most so many of them, first and last among them, as words."""
    every = max(1, -(-(len(pairs) - 1) // (most - 1)))
    chosen = [*pairs[:-1:every], pairs[-1]] if pairs else []
    return ", ".join(f"step {step} {form.format(value)}" for step, value in chosen)
