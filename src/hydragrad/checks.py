"""Whether scores can be believed: finite differences by really retraining, growth, drift, a verdict in words."""

import math
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hydragrad.derivatives import DERIVATIVES
from hydragrad.diagnostics import Range, Rung, Smoothing, Verdict
from hydragrad.errors import NonFiniteError
from hydragrad.hypergradient.consistency import HALF_PRECISION
from hydragrad.hypergradient.queries import Columns, Queries
from hydragrad.run import Run
from hydragrad.smoothing import judge as judge_smoothed
from hydragrad.trajectory.repeating import Nondeterminism
from hydragrad.trajectory.reweighted import seen

LADDER = (0.1, 1.0)
"""Steps h of the weights 1 - h and 1 + h; the top, 1, really removes (and doubles) the examples."""
SMALLER = 0.01
"""One more step below the ladder, taken where its lowest fails, so that the range has a place to be found in."""
FEW = 5
"""Examples reweighted: the size of change that scores are asked about."""
RELIABLE, DOUBTFUL = 0.35, 0.7
"""Relative errors at the top of the ladder up to which first-order scores are called reliable, doubtful.

Measured by experiments/approximation.py: scores with errors up to 0.31 had leave-one-out correlations of 0.7 to 1.0,
with 0.5 one of 0.6, with 0.75 and more at most 0.3.
"""
REMAINDER = 0.35
"""What is beyond first order, relative to it, up to which scores are said to hold: the limit of ``reliable``."""
GROWTH = 1e4
"""Growth of the adjoint above which the run is called chaotic: a change of 1e-4 in a weight fills the measurement."""


@final
@dataclass(frozen=True)
class FiniteDifferences:
    """The ladder of differences along one direction: all rows of a few chosen examples or groups."""

    ladder: tuple[Rung, ...]
    examples: tuple[int, ...]
    seed: int
    failure: str = ""
    """Why a replay with these weights could not be compared."""

    @property
    def range(self) -> Range:
        """How far the weights of these examples may move before what is beyond first order exceeds ``REMAINDER``."""
        return estimated_range(self.ladder, len(self.examples))


def finite_differences(
    run: Run,
    queries: Queries,
    columns: Columns,
    scores: Tensor,
    members: Tensor,
    step: int,
    seed: int,
    base: Tensor | None = None,
) -> FiniteDifferences:
    """Compare ``scores`` [R, M] with replays in which a few rows' examples weigh 1 - h and 1 + h.

    ``members`` int64 [N]: the row an example counts in, -1 for none. Predicted: m(1 - h) - m(1 + h) = 2 h sum of the
    rows' scores; every query is one comparison, two replays serve them all. ``base`` [N]: weights in place of 1; the
    rows are then chosen from those that weigh anything.
    """
    base = torch.ones(len(members), dtype=torch.float64) if base is None else base.double()
    generator = torch.Generator().manual_seed(seed)
    present = seen(run.steps[:step], len(members)) & (base != 0)
    rows = members[present & (members >= 0)].unique()
    picked = rows[torch.randperm(len(rows), generator=generator)[:FEW]]
    touched = torch.isin(members, picked)
    predicted = scores[picked].sum(0).double()

    failures: list[str] = []

    def measured(h: float) -> Tensor:
        weights = base.clone()
        weights[touched] += h
        try:
            return columns.collect(queries.values(run.replay(weights=weights, until=step)))
        except NonFiniteError as error:
            failures.append(f"retrained with those examples weighing {1 + h:g} each, {error}")
            return torch.full((columns.count,), float("nan"), dtype=torch.float64)

    trained = measured(0.0)  # no more than a look at the recorded state: no weight differs from 1

    def rung(h: float) -> Rung:
        down, up = measured(-h), measured(h)
        change = (down - up) / (2 * h)
        remainder = torch.stack([down - trained - h * predicted, up - trained + h * predicted]).norm()
        return Rung(h, _error(change, predicted), _correlation(change, predicted), _share(remainder, h, predicted))

    rungs = [rung(h) for h in LADDER]
    if not rungs[0].remainder <= REMAINDER:
        rungs.insert(0, rung(SMALLER))
    return FiniteDifferences(tuple(rungs), tuple(touched.nonzero().flatten().tolist()), seed, *failures[:1])


def estimated_range(ladder: tuple[Rung, ...], examples: int) -> Range:
    """The largest step h up to which the remainder stays within ``REMAINDER``, between two rungs by a power law.

    By Taylor's theorem m(1 - h) - m(1) = h S + c h^p + ..., p >= 2: the remainder relative to h S grows as h^(p-1), a
    straight line in logarithms, exactly so where one power rules.
    """
    low, below = 0.0, None
    for rung in ladder:
        if not rung.remainder <= REMAINDER:
            return Range(_crossing(below, rung), low, rung.step, examples, REMAINDER)
        low, below = rung.step, rung
    return Range(low, low, math.inf, examples, REMAINDER)


def _crossing(below: Rung | None, above: Rung) -> float:
    """Where the line through two rungs, in logarithms, meets the limit; the last rung that held where none is."""
    if below is None:
        return 0.0
    if not math.isfinite(above.remainder):
        return below.step
    a, b = (math.log(max(r.remainder, 1e-12)) for r in (below, above))
    share = (math.log(REMAINDER) - a) / (b - a)
    return below.step * (above.step / below.step) ** share


def _share(remainder: Tensor, h: float, predicted: Tensor) -> float:
    """||remainder|| of both sides together, relative to that of the prediction."""
    scale = math.sqrt(2) * h * float(predicted.norm())
    return float(remainder) / scale if scale else (math.inf if float(remainder) else 0.0)


def _error(measured: Tensor, predicted: Tensor) -> float:
    scale = float(measured.norm())
    return float((measured - predicted).norm()) / scale if scale else float(predicted.norm() > 0)


def _correlation(a: Tensor, b: Tensor) -> float:
    if len(a) < 3 or float(a.std()) == 0 or float(b.std()) == 0:
        return float("nan")
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


@final
@dataclass(frozen=True)
class Checks:
    """What was looked at besides the sweep: the ladder, torch's derivatives, a step repeated. None: not looked at.

    ``slopes``: of the measurement; ``smoothing``: for means over several runs, in place of the ladder; ``gap``: of the
    gradient that is differentiated to the step's; ``half``: the dtype of autocast, if steps ran under it.
    """

    found: FiniteDifferences | None = None
    derivatives: float | None = None
    slopes: float | None = None
    unsteady: Nondeterminism | None = None
    smoothing: Smoothing | None = None
    gap: float = 0.0
    half: str = ""


def judge(
    method: str, checks: Checks, growth: float, drift: float, drift_limit: float
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict on first-order scores for this run, with its reasons."""
    found, derivatives = checks.found, checks.derivatives
    reasons: list[str] = []
    verdict: Verdict = "unchecked"
    if checks.smoothing is not None and checks.smoothing.subsets:
        verdict, reasons = judge_smoothed(checks.smoothing, method)
    if found is not None:
        top = found.ladder[-1]
        verdict = "reliable" if top.error <= RELIABLE else "doubtful" if top.error <= DOUBTFUL else "meaningless"
        words = {
            "reliable": "as the scores predicted",
            "doubtful": "as the scores predicted only roughly",
            "meaningless": "otherwise than the scores predicted",
        }[verdict]
        reasons.append(
            f"really removing {len(found.examples)} examples changed the queries {words} "
            f"(relative error {top.error:.2f}, limits {RELIABLE} and {DOUBTFUL})"
        )
        if verdict != "reliable":
            reasons.append(found.failure or _why(method, found))
    if derivatives is not None and derivatives > DERIVATIVES:
        verdict = "meaningless" if verdict == "meaningless" else "doubtful"
        reasons.append(
            f"torch's derivatives of this model are off by {derivatives:.1e} from finite differences in float64: "
            "an operation with a wrong second derivative (a fused kernel, a custom autograd function), a value that "
            "depends on the parameters and is taken for a constant (detach, no_grad), or a kink"
        )
    if checks.slopes is not None and checks.slopes > DERIVATIVES:
        verdict = "meaningless" if verdict == "meaningless" else "doubtful"
        reasons.append(slopes_off(checks.slopes))
    if growth > GROWTH:
        verdict = "meaningless" if verdict == "meaningless" else "doubtful"
        reasons.append(f"the adjoint grew {growth:.1e} times: the run amplifies small changes (chaotic training)")
    if drift > drift_limit:
        verdict = "meaningless" if verdict == "meaningless" else "doubtful"
        reasons.append(
            f"the replay ended {drift:.1e} (relative) away from the recorded run: "
            + str(checks.unsteady or "another machine, thread count or non-deterministic kernels")
        )
    if checks.half and checks.gap > HALF_PRECISION:
        verdict = "meaningless" if verdict == "meaningless" else "doubtful"
        reasons.append(
            f"the gradient in full precision is {checks.gap:.1%} from the step's, which ran under autocast "
            f"({checks.half}): beyond the {HALF_PRECISION:.0%} that is usual, and allowed by drift_tolerance"
        )
    return verdict, tuple(reasons)


def slopes_off(error: float) -> str:
    """What a wrong slope of the measurement comes from."""
    return (
        f"the slopes of what is measured of the queries are off by {error:.1e} from finite differences: a value in the "
        "measurement (or the loss, or the model in evaluation mode) that depends on the parameters and is taken for a "
        "constant (detach, no_grad, .item(), numpy), a slope that is not the value's (straight-through), or a kink"
    )


def _why(method: str, found: FiniteDifferences) -> str:
    if method == "hessian-free":
        return "hessian-free drops the curvature of the whole run; compare with method='exact'"
    if method == "gauss-newton":
        return "gauss-newton drops the second derivatives of the model; compare with method='exact'"
    if found.ladder[0].error < found.ladder[-1].error / 2:
        return "small reweightings are predicted well, whole examples are not: their effect is not linear in the weight"
    return (
        "the run reacts to reweighting in a way that no first-order score follows: lower the learning rate to compare"
    )
