"""Scores averaged over a run and others that lack random parts of its data: which, and whether retraining agrees."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from tqdm import tqdm

from hydragrad.diagnostics import Smoothing, Verdict
from hydragrad.errors import MismatchError, NonFiniteError, UnsupportedError, message
from hydragrad.hypergradient.queries import Columns, Queries
from hydragrad.run import Run
from hydragrad.trajectory.replay import check_weights
from hydragrad.trajectory.reweighted import seen

FRACTION, FEW_RUNS = 0.1, 8
"""About the part of the examples that each of the runs lacks; an eighth where there are fewer than eight."""
ABSENT = 0.5
"""What an example's score counts in a run that lacks it: a convention, best over the tasks in docs/smoothing.md."""
SUBSETS = 8
"""Retrainings that put smoothed scores to the proof."""
RELIABLE, DOUBTFUL = 0.5, 0.25
"""Correlations of predicted and actual changes down to which smoothed scores are reliable, doubtful; conventions."""


@final
@dataclass(frozen=True)
class Runs:
    """Which runs are swept: those with ``weights`` [R, N]; None: the recorded one.

    ``fraction``: the part of the examples that each of them lacks at random; None: nothing was drawn.
    """

    weights: Tensor | None = None
    fraction: float | None = None

    @staticmethod
    def of(count: int, smoothing: int | None, fraction: float | None, weights: Tensor | None, seed: int) -> "Runs":
        """As asked; refuses what names no such runs."""
        check_smoothing(smoothing, fraction)
        if weights is not None and smoothing is not None:
            raise MismatchError(message("weights and smoothing together", remedy="give one of them"))
        if weights is not None:
            return Runs(check_weights(weights, count).cpu()[None])
        if smoothing is None:
            return Runs()
        part = even_fraction(smoothing) if fraction is None else float(fraction)
        return Runs(removals(count, smoothing, part, seed), part)

    def __len__(self) -> int:
        return 0 if self.weights is None else len(self.weights)

    def __iter__(self) -> Iterator[Tensor | None]:
        """The weights [N] of each run; None for the recorded one."""
        return iter([None] if self.weights is None else [None if bool((w == 1).all()) else w for w in self.weights])

    def counting(self, weights: Tensor | None) -> Tensor | None:
        """What the score of each example counts in a run with these weights [N]; None: all count fully."""
        if self.fraction is None or weights is None:
            return None
        return torch.where(weights == 0, ABSENT, 1.0)


def check_smoothing(smoothing: int | None, fraction: float | None = None) -> None:
    """Refuse what is no number of runs, or no part of the data."""
    if smoothing is not None and (isinstance(smoothing, bool) or not isinstance(smoothing, int) or smoothing < 1):
        raise UnsupportedError(
            message("smoothing is no number of runs", expected="an integer, at least 1 (or None)", got=repr(smoothing))
        )
    if fraction is not None and not 0 <= fraction < 1:
        raise UnsupportedError(
            message("fraction is no part of the data", expected="a number from 0 to below 1", got=repr(fraction))
        )


def even_fraction(runs: int) -> float:
    """The multiple of 1/R nearest to ``FRACTION``, at least 1/R: every example is missing equally often.

    Of fewer than eight runs some examples are missing in none: parts above an eighth would be another problem.
    """
    return max(round(FRACTION * runs), 1) / runs if runs >= FEW_RUNS else 1 / FEW_RUNS


def removals(count: int, runs: int, fraction: float, seed: int) -> Tensor:
    """Weights [R, N] of runs that lack a random ``fraction`` of the examples each, and every example equally often.

    The parts are cut one after the other from random permutations of all examples, drawn under ``seed``: disjoint until
    every example was missing once. The first R rows are the same for every larger R.
    """
    generator = torch.Generator().manual_seed(seed)
    weights = torch.ones(runs, count, dtype=torch.float64)
    size = min(round(fraction * count), count - 1)
    left = torch.empty(0, dtype=torch.int64)
    for row in weights:
        if len(left) < size:
            order = torch.randperm(count, generator=generator)
            again = torch.isin(order, left)  # what is still to come of the last permutation comes first, and once
            left = torch.cat([left, order[~again], order[again]])
        row[left[:size]] = 0.0
        left = left[size:]
    return weights


def proved(
    smoothing: Smoothing,
    run: Run,
    queries: Queries,
    columns: Columns,
    scores: Tensor,
    members: Tensor,
    step: int,
    seed: int,
    progress: bool,
) -> Smoothing:
    """Retrain without random parts of the rows, of the size that was smoothed over, and compare.

    ``scores`` [R, M]; ``members`` int64 [N]: the row an example counts in, -1 for none. Predicted is the sum of the
    removed rows' scores, actual the change of the queries. Both are centred over the subsets, for each query: what
    removing any part of that size does to all alike does not tell which examples matter.
    """
    generator = torch.Generator().manual_seed(seed + 1)  # not the subsets that the scores are means over
    rows = members[seen(run.steps[:step], len(members)) & (members >= 0)].unique()
    size = max(1, round(smoothing.fraction * len(rows)))
    chosen = [rows[torch.randperm(len(rows), generator=generator)[:size]] for _ in range(SUBSETS)]
    actual = []
    for picked in tqdm(chosen, desc="retraining to check", unit="run", delay=2, disable=not progress):
        weights = torch.ones(len(members), dtype=torch.float64)
        weights[torch.isin(members, picked)] = 0.0
        try:
            values = queries.values(run.replay(weights=weights, until=step))
        except NonFiniteError as error:
            failure = f"retrained without a random {smoothing.fraction:.0%} of the data, {error}"
            return replace(smoothing, subsets=SUBSETS, failure=failure)
        actual.append(columns.collect(values))
    predicted = torch.stack([scores[picked].double().sum(0) for picked in chosen])
    a, p = (x - x.mean(0) for x in (torch.stack(actual), predicted))
    scale, both = float(a.norm()), float(a.norm() * p.norm())
    return replace(
        smoothing,
        subsets=SUBSETS,
        error=float((a - p).norm()) / scale if scale else float(p.norm() > 0),
        correlation=float((a * p).sum()) / both if both else float("nan"),
    )


def judge(found: Smoothing, method: str) -> tuple[Verdict, list[str]]:
    """The verdict on smoothed scores, with its reasons."""
    ran = (
        f"scores are means over {found.runs} runs that lack a random {found.fraction:.0%} of the examples each: "
        "they predict what removing parts of about that size does, not what removing one example does (smoothing=None)"
    )
    if found.failure:
        return "meaningless", [ran, found.failure]
    r = found.correlation
    verdict: Verdict = "reliable" if r >= RELIABLE else "doubtful" if r >= DOUBTFUL else "meaningless"
    reasons = [
        ran,
        f"really removing {found.subsets} other random parts of that size changed the queries with a correlation of "
        f"{r:.2f} with what the scores predicted (limits {RELIABLE} and {DOUBTFUL})",
    ]
    if verdict != "reliable" and found.spread > 0.5:
        reasons.append(f"the mean is not settled (relative standard error {found.spread:.2f}): take more runs")
    if verdict != "reliable" and method != "exact":
        reasons.append("compare with method='exact'")
    return verdict, reasons
