"""Whether scores can be believed: finite differences by really retraining, growth, drift, a verdict in words."""

import copy
from dataclasses import dataclass, fields
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from hydragrad.diagnostics import Rung, Verdict
from hydragrad.errors import NonFiniteError
from hydragrad.hypergradient.costs import probe_block, probe_buffers
from hydragrad.hypergradient.curvature import zeros
from hydragrad.hypergradient.engines import reference
from hydragrad.hypergradient.queries import Columns, Queries
from hydragrad.run import Run
from hydragrad.step.objective import Objective, Point, Vectors

LADDER = (0.1, 1.0)
"""Steps h of the weights 1 - h and 1 + h; the top, 1, really removes (and doubles) the examples."""
FEW = 5
"""Examples reweighted: the size of change that scores are asked about."""
RELIABLE, DOUBTFUL = 0.35, 0.7
"""Relative errors at the top of the ladder up to which first-order scores are called reliable, doubtful.

Measured by experiments/approximation.py: scores with errors up to 0.31 had leave-one-out correlations of 0.7 to 1.0,
with 0.5 one of 0.6, with 0.75 and more at most 0.3.
"""
DERIVATIVES = 1e-3
"""Relative error of torch's second derivatives above which some operation's derivative is wrong."""
GROWTH = 1e4
"""Growth of the adjoint above which the run is called chaotic: a change of 1e-4 in a weight fills the measurement."""


@final
@dataclass(frozen=True)
class FiniteDifferences:
    """The ladder of central differences along one direction: all rows of a few chosen examples or groups."""

    ladder: tuple[Rung, ...]
    examples: tuple[int, ...]
    seed: int
    failure: str = ""
    """Why a replay with these weights could not be compared."""


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

    failures: list[str] = []

    def measured(h: float) -> Tensor:
        weights = torch.ones(len(members), dtype=torch.float64)
        weights[touched] += h
        try:
            values = queries.values(run.replay(weights=weights, until=step)).double().cpu()
        except NonFiniteError as error:
            failures.append(f"retrained with those examples weighing {1 + h:g} each, {error}")
            return torch.full((columns.count,), float("nan"), dtype=torch.float64)
        return torch.zeros(columns.count, dtype=torch.float64).index_add_(0, columns.of, values * columns.factor)

    rungs = []
    for h in LADDER:
        change = (measured(-h) - measured(h)) / (2 * h)
        rungs.append(Rung(h, _error(change, predicted), _correlation(change, predicted)))
    return FiniteDifferences(tuple(rungs), tuple(touched.nonzero().flatten().tolist()), seed, *failures[:1])


def _error(measured: Tensor, predicted: Tensor) -> float:
    scale = float(measured.norm())
    return float((measured - predicted).norm()) / scale if scale else float(predicted.norm() > 0)


def _correlation(a: Tensor, b: Tensor) -> float:
    if len(a) < 3 or float(a.std()) == 0 or float(b.std()) == 0:
        return float("nan")
    return float(torch.corrcoef(torch.stack([a, b]))[0, 1])


def derivative_error(objective: Objective, point: Point, method: str) -> float | None:
    """Relative error of torch's derivatives of this model against finite differences, in float64, on one batch.

    The reference engine's products against differences of first derivatives along one random vector: it finds kernels
    whose second derivative is wrong, which no comparison of engines can. None if the model does not run in float64.
    """
    try:
        double = Objective(
            objective.problem,
            copy.deepcopy(objective.module).double(),
            objective.names,
            objective.carried,
            objective.counters,
        )
        here = Point(*(pytree.tree_map(_doubled, getattr(point, field.name)) for field in fields(Point)))
        vector = tuple(v / len(v) ** 0.5 for v in (x[0] for x in probe_block(here, 1)))
        with double.differentiable():
            gam = tuple(v.unsqueeze(0) for v in vector)
            bet = tuple(torch.zeros_like(v).unsqueeze(0) for v in here.carried)
            curved, terms, _ = reference(method, double).products(here, gam, bet)
            h = 1e-6
            ends = [_first_derivatives(double, here, vector, sign * h) for sign in (1, -1)]
            buffers = _buffers_error(double, here, vector, method) if here.carried else 0.0
    except (RuntimeError, TypeError, NotImplementedError):
        return None
    pairs = [((ends[0][0] - ends[1][0]) * here.coefficients / (2 * h), terms[0])]
    if method == "exact" and curved is not None:
        up, down = (torch.cat([g.flatten() for g in end[1]]) for end in ends)
        pairs.append(((up - down) / (2 * h), torch.cat([c.flatten() for c in curved])))
    return max(buffers, *(float((a - b).norm()) / max(float(a.norm()), 1e-30) for a, b in pairs))


def _buffers_error(objective: Objective, point: Point, vector: Vectors, method: str) -> float:
    """As ``derivative_error``, for the buffers: V along random directions, and for ``exact`` g along one of v.

    A vector-Jacobian product has no entry to compare with a difference, so numbers are compared: its product with the
    direction, and the difference's with the cotangent.
    """
    engine, both = reference(method, objective), probe_buffers(point, 2)
    bet, along = tuple(x[:1] for x in both), tuple(x[1] for x in both)
    gam, h = tuple(v.unsqueeze(0) for v in vector), 1e-6

    def paired(a: Vectors | None, b: Vectors) -> float:
        return sum(float((x * y).sum()) for x, y in zip(a or (), b, strict=True))

    def norm(a: Vectors) -> float:
        return paired(a, a) ** 0.5

    curved, _, back = engine.products(point, zeros(gam), bet)
    ends = [_moved(objective, point, vector, along, sign * h) for sign in (1, -1)]
    slopes = tuple((a - b) / (2 * h) for a, b in zip(*(end[1] for end in ends), strict=True))
    expected, found = paired(slopes, tuple(x[0] for x in bet)), paired(curved, gam) + paired(back, along)
    error = abs(found - expected) / max(norm(slopes) * norm(bet), 1e-30)
    if method != "exact":
        return error
    _, _, back = engine.products(point, gam, zeros(bet))
    ends = [_moved(objective, point, zeros(vector), along, sign * h) for sign in (1, -1)]
    slopes = tuple((a - b) / (2 * h) for a, b in zip(*(end[0] for end in ends), strict=True))
    scale = norm(vector) * (norm(slopes) + norm(ends[0][0]))  # g may not depend on v at all
    return max(error, abs(paired(back, along) - paired(slopes, vector)) / max(scale, 1e-30))


def _moved(objective: Objective, point: Point, vector: Vectors, along: Vectors, h: float) -> tuple[Vectors, Vectors]:
    """The gradient of J and V at (w, v) + h (vector, along)."""
    with torch.enable_grad():
        params = tuple((p + h * v).detach().requires_grad_() for p, v in zip(point.params, vector, strict=True))
        carried = tuple(p + h * v for p, v in zip(point.carried, along, strict=True))
        losses, after = objective.evaluate(params, point.rest, point.batch, carried, point.draws)
        scalar = (point.coefficients * point.weights * losses).sum()
        return torch.autograd.grad(scalar, params, materialize_grads=True), tuple(v.detach() for v in after)


def _doubled(x: Any) -> Any:
    return x.double() if isinstance(x, Tensor) and x.is_floating_point() else x


def _first_derivatives(objective: Objective, point: Point, vector: Vectors, h: float) -> tuple[Tensor, Vectors]:
    """Losses and gradient of J at w + h v."""
    with torch.enable_grad():
        params = tuple((p + h * v).detach().requires_grad_() for p, v in zip(point.params, vector, strict=True))
        losses = objective.losses(params, point.rest, point.batch, point.carried, point.draws)
        scalar = (point.coefficients * point.weights * losses).sum()
        return losses.detach(), torch.autograd.grad(scalar, params, materialize_grads=True)


def judge(
    method: str,
    found: FiniteDifferences | None,
    growth: float,
    drift: float,
    drift_limit: float,
    derivatives: float | None,
) -> tuple[Verdict, tuple[str, ...]]:
    """The verdict on first-order scores for this run, with its reasons."""
    reasons: list[str] = []
    verdict: Verdict = "unchecked"
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
            "an operation with a wrong second derivative (a fused kernel, a custom autograd function), or a kink"
        )
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
