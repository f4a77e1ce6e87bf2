"""Whether scores can be believed: finite differences by really retraining, growth, drift, a verdict in words."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from hydragrad.diagnostics import Rung, Verdict
from hydragrad.hypergradient.queries import Columns, Queries
from hydragrad.run import Run

LADDER = (0.1, 1.0)
"""Steps h of the weights 1 - h and 1 + h; the top, 1, really removes (and doubles) the examples."""
FEW = 5
"""Examples reweighted: the size of change that scores are asked about."""
RELIABLE, DOUBTFUL = 0.5, 0.9
"""Relative errors at the top of the ladder up to which first-order scores are called reliable, doubtful."""
GROWTH = 1e4
"""Growth of the adjoint above which the run is called chaotic: a change of 1e-4 in a weight fills the measurement."""


@final
@dataclass(frozen=True)
class FiniteDifferences:
    """The ladder of central differences along one direction: all rows of a few chosen examples or groups."""

    ladder: tuple[Rung, ...]
    examples: tuple[int, ...]
    seed: int


def finite_differences(
    run: Run,
    queries: Queries,
    columns: Columns,
    scores: Tensor,
    members: Tensor,
    step: int,
    seed: int,
) -> FiniteDifferences:
    """Compare ``scores`` [R, M] with replays in which a few rows' examples weigh 1 - h and 1 + h.

    ``members`` int64 [N]: the row an example counts in, -1 for none. Predicted: m(1 - h) - m(1 + h) = 2 h sum of the
    rows' scores; every query is one comparison, two replays serve them all.
    """
    generator = torch.Generator().manual_seed(seed)
    present = torch.zeros(len(members), dtype=torch.bool)
    for record in run.steps[:step]:
        for ids in record.batches:
            present[ids] = True
    rows = members[present & (members >= 0)].unique()
    picked = rows[torch.randperm(len(rows), generator=generator)[:FEW]]
    touched = torch.isin(members, picked)
    predicted = scores[picked].sum(0).double()

    def measured(h: float) -> Tensor:
        weights = torch.ones(len(members), dtype=torch.float64)
        weights[touched] += h
        values = queries.values(run.replay(weights=weights, until=step)).double().cpu()
        return torch.zeros(columns.count, dtype=torch.float64).index_add_(0, columns.of, values * columns.factor)

    rungs = []
    for h in LADDER:
        change = (measured(-h) - measured(h)) / (2 * h)
        rungs.append(Rung(h, _error(change, predicted), _correlation(change, predicted)))
    return FiniteDifferences(tuple(rungs), tuple(touched.nonzero().flatten().tolist()), seed)


def _error(measured: Tensor, predicted: Tensor) -> float:
    scale = float(measured.norm())
    return float((measured - predicted).norm()) / scale if scale else float(predicted.norm() > 0)


def _correlation(a: Tensor, b: Tensor) -> float:
    if len(a) < 3 or float(a.std()) == 0 or float(b.std()) == 0:
        return float("nan")
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def judge(
    method: str, found: FiniteDifferences | None, growth: float, drift: float, drift_limit: float
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict on first-order scores for this run, with its reasons."""
    reasons: list[str] = []
    verdict: Verdict = "unchecked"
    if found is not None:
        top = found.ladder[-1]
        verdict = "reliable" if top.error <= RELIABLE else "doubtful" if top.error <= DOUBTFUL else "meaningless"
        words = {
            "reliable": "the scores predicted it",
            "doubtful": "the scores predicted it only roughly",
            "meaningless": "the scores did not predict it",
        }[verdict]
        reasons.append(
            f"really removing {len(found.examples)} examples changed the queries by what {words} "
            f"(relative error {top.error:.2f}, limits {RELIABLE} and {DOUBTFUL})"
        )
        if verdict != "reliable":
            reasons.append(_why(method, found))
    if growth > GROWTH:
        verdict = "meaningless" if verdict == "meaningless" else "doubtful"
        reasons.append(f"the adjoint grew {growth:.1e} times: the run amplifies small changes (chaotic training)")
    if drift > drift_limit:
        verdict = "meaningless" if verdict == "meaningless" else "doubtful"
        reasons.append(
            f"the replay ended {drift:.1e} (relative) away from the recorded run: another machine, thread count or "
            "non-deterministic kernels"
        )
    return verdict, tuple(reasons)


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
