"""The verb: choose changes, retrain under them, compare with what the scores predicted."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hydragrad.attribution import Attribution
from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.fitting import check_question, columns_of, groups_of
from hydragrad.labels import Relabel, with_label
from hydragrad.retraining import designs
from hydragrad.retraining.carrying import carried_out
from hydragrad.retraining.counterfactual import Change
from hydragrad.retraining.designs import COUNTS, METRICS, SIZES, Design, Rows
from hydragrad.retraining.measuring import Outcome, Question, Retrainer
from hydragrad.retraining.planning import RetrainingPlan
from hydragrad.run import Run
from hydragrad.suspecting import mislabels
from hydragrad.validation import Validation


def validate(
    run: Run,
    scores: Attribution,
    queries: Any,
    *,
    metric: str = "loo",
    n: int | None = None,
    fraction: int | float = 0.1,
    choice: str = "uniform",
    sizes: Sequence[int | float] = SIZES,
    targets: Sequence[int] | None = None,
    weight: int | float = 0.0,
    labels: Mapping[Any, Any] | None = None,
    relabel: Relabel = with_label,
    measurement: Callable[[nn.Module, Any], Tensor] | None = None,
    accuracy: Callable[[nn.Module, Any], Tensor] | None = None,
    aggregate: str | Tensor | Sequence[int] | None = None,
    groups: Tensor | Sequence[int] | None = None,
    step: int | None = None,
    seed: int = 0,
    jobs: int | None = None,
    resume: str | Path | None = None,
    on_plan: Callable[[RetrainingPlan], None] | None = None,
    progress: bool = True,
) -> Validation:
    """Put scores to the proof: really retrain without some examples, and compare.

        predicted[k, j] = sum of score[i, j] over what is removed in retraining k
        actual[k, j]    = m_j(retrained) - m_j(as trained)

    A retraining takes the recorded steps again (``Run.replay``) with the losses of the chosen examples at weight 0.
    ``metric``:

    - "loo": ``n`` (30) rows one by one; ``choice``: "uniform", or "stratified": half among the largest mean |score|;
    - "subset": ``n`` (50) random subsets of a ``fraction`` of the rows: the linear datamodeling score (LDS);
    - "remove": for the mean query, or each query id of ``targets``, the most helpful and the most harmful rows, at
      several ``sizes`` (fractions or numbers of rows), against ``n`` (3) random draws; their losses get ``weight``;
    - "relabel": one example at a time with another label: ``labels`` {id: label or new sample}, by default the ``n``
      (20) worst suspects of ``mislabels`` with the labels it suggests; ``relabel(sample, label) -> sample`` for other
      samples than (input, label). Predicted is the removal of the example: scores know nothing of other labels.

    ``queries``, ``measurement``, ``aggregate``, ``groups``, ``step``: as they were given to ``attribute``;
    ``accuracy(model, batch) -> [m]`` of 0 and 1 is followed beside them. ``jobs``: retrainings side by side through
    joblib (-1: all cores; None: an ambient ``joblib.parallel_config``, else 1), each with one thread; ``resume``: a
    folder that keeps every finished retraining; ``on_plan`` gets the plan before the work (else it is written to
    stderr with the bar). Raises MismatchError, UnsupportedError, NonFiniteError, StoreError.

    Example: ``print(hydragrad.validate(run, scores, test_set, metric="loo", n=30))``.
    """
    began = time.perf_counter()
    columns = columns_of(scores, queries, aggregate)
    rows = Rows(scores.total.double(), scores.train_ids, groups_of(run, scores, groups))
    until = run.num_steps if step is None else step
    question = Question(
        run.trajectory.folder.resolve(), run.problem, queries, columns, until, measurement, accuracy
    )  # fmt: skip
    retrainer = Retrainer(question, run)
    check_question(run, scores, queries, columns, measurement=measurement, groups=groups, step=until)
    options = {"fraction": fraction, "choice": choice, "sizes": sizes, "targets": targets, "weight": weight}
    design = _designed(run, scores, rows, metric, n, seed, labels=labels, relabel=relabel, **options)
    changes = [Change(), *design.changes]  # the first: as trained
    done, plan = carried_out(retrainer, changes, jobs, resume, on_plan, progress)
    return _answer(scores, metric, design, done, plan, seed, time.perf_counter() - began)


def _designed(
    run: Run,
    scores: Attribution,
    rows: Rows,
    metric: str,
    n: int | None,
    seed: int,
    *,
    fraction: int | float,
    choice: str,
    sizes: Sequence[int | float],
    targets: Sequence[int] | None,
    weight: int | float,
    labels: Mapping[Any, Any] | None,
    relabel: Relabel,
) -> Design:
    """The changes that ``metric`` asks for, drawn under ``seed``."""
    n = _count(metric, n)
    generator = torch.Generator().manual_seed(seed)
    if metric == "loo":
        return designs.one_by_one(rows, n, choice, generator)
    if metric == "subset":
        return designs.subsets(rows, n, fraction, generator)
    if metric == "remove":
        return designs.extremes(rows, n, sizes, _targets(scores, rows, targets), weight, generator)
    if rows.grouped:
        raise UnsupportedError(
            message("groups cannot be relabelled", remedy="use scores of single examples for metric='relabel'")
        )
    chosen = _suspects(run, n, relabel) if labels is None else labels
    return designs.relabelled(rows, run.problem.data, chosen, relabel)


def _answer(
    scores: Attribution,
    metric: str,
    design: Design,
    done: list[Outcome],
    plan: RetrainingPlan,
    seed: int,
    seconds: float,
) -> Validation:
    """The outcomes (as trained, then of every change) beside what the scores predicted."""
    before = done[0].values
    hits = [torch.nan if outcome.hits is None else float(outcome.hits.mean()) for outcome in done]
    return Validation(
        metric=metric,
        method=_method(scores),
        predicted=design.predicted,
        actual=torch.stack([outcome.values - before for outcome in done[1:]]),
        before=before,
        query_ids=scores.query_ids,
        items=tuple(design.items),
        accuracy=torch.tensor(hits[1:], dtype=torch.float64),
        accuracy_before=hits[0],
        seed=seed,
        seconds=seconds,
        threads=plan.threads,
        bitwise=done[0].bitwise,
        plan=str(plan),
        run=scores.run,
    )


def _method(scores: Attribution) -> str:
    smoothing = scores.diagnostics.smoothing
    return f"smoothed {scores.method}" if smoothing is not None and smoothing.runs > 1 else scores.method


def _targets(scores: Attribution, rows: Rows, targets: Sequence[int] | None) -> list[tuple[int | None, Tensor]]:
    if targets is None:
        return [(None, rows.mean())]
    known = {int(query): column for column, query in enumerate(scores.query_ids)}
    unknown = [target for target in targets if target not in known]
    if unknown or not targets:
        raise MismatchError(message("no such queries", expected="query ids of the scores", got=unknown or "none"))
    return [(int(target), rows.scores[:, known[target]]) for target in targets]


def _count(metric: str, n: int | None) -> int:
    if metric not in METRICS:
        raise UnsupportedError(message("unknown metric", expected=" or ".join(map(repr, METRICS)), got=repr(metric)))
    if n is not None and n < 1:
        raise MismatchError(message("nothing to retrain", expected="n of at least 1", got=n))
    return COUNTS[metric] if n is None else n


def _suspects(run: Run, n: int, relabel: Relabel) -> dict[int, int]:
    found = mislabels(run, relabel=relabel, progress=False)
    chosen = {row.id: row.suggested for row in found.top(len(found)) if row.suggested not in (None, row.label)}
    return dict(list(chosen.items())[:n])  # type: ignore[arg-type]
