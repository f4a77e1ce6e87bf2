"""Whether scores belong to a run and to queries: what is shown or proved must be what was attributed."""

from typing import Any

import torch
from torch import Tensor

from hydragrad.asked import Asked
from hydragrad.attribution import Attribution
from hydragrad.errors import MismatchError, NonFiniteError, message
from hydragrad.hypergradient.queries import Columns, group_numbers, length_of
from hydragrad.retraining.measuring import queries_of
from hydragrad.run import Run
from hydragrad.trajectory.identity import identity


def columns_of(scores: Attribution, queries: Any, aggregate: Any) -> Columns:
    """Which column of ``scores`` each query counts in. Raises MismatchError for other queries."""
    kind = aggregate if isinstance(aggregate, str) or aggregate is None else torch.as_tensor(aggregate)
    columns = Columns.make(kind, length_of(queries))
    if columns.count != len(scores.query_ids):
        raise MismatchError(
            message(
                "the scores are not those of these queries",
                expected=f"{len(scores.query_ids)} columns, as the scores have",
                got=f"{columns.count} columns from {length_of(queries)} queries",
                cause="other queries, or scores with aggregate=",
                remedy="give the queries, and aggregate=, as they were given to attribute",
            )
        )
    return columns


def groups_of(run: Run, scores: Attribution, groups: Any) -> Tensor | None:
    """The row of each training example, int64 [N]; None where rows are examples.

    Raises MismatchError for scores of another run or of other groups, NonFiniteError for scores that are not finite.
    """
    check_run(run, scores)
    if not bool(scores.values.isfinite().all()):
        raise NonFiniteError(message("the scores are not finite", remedy="attribute again: they were altered"))
    if groups is not None:
        numbers, _, count = group_numbers(groups, run.num_examples, "groups", "training example")
        if count != len(scores.train_ids):
            raise MismatchError(
                message("the scores are not those of these groups", expected=f"{count} rows", got=len(scores.train_ids))
            )
        return numbers
    if len(scores.train_ids) and int(scores.train_ids.max()) >= run.num_examples:
        raise MismatchError(
            message(
                "the scores are not those of this run",
                expected=f"train ids below {run.num_examples}",
                got=int(scores.train_ids.max()),
                cause="scores of another run or data set",
            )
        )
    return None


def check_question(
    run: Run, scores: Attribution, queries: Any, columns: Columns, *, measurement: Any, groups: Any, step: int
) -> None:
    """Raises MismatchError for scores that say they answer another question."""
    if scores.asked is not None:
        state = next(run.states(step, step + 1))
        measured = columns.collect(queries_of(run, queries, measurement).values(state))
        scores.asked.check(Asked.of(measured, step, groups, measurement), scores.values.dtype)


def check_run(run: Run, scores: Attribution) -> None:
    """Raises MismatchError for scores that say they are another run's."""
    if scores.run and scores.run != identity(run.steps):
        raise MismatchError(
            message(
                "the scores are not those of this run",
                expected="scores of this recorded run",
                got=f"{scores!r} of a run with other steps",
                cause="another run, or this one was trained again after it was attributed",
                remedy="give the run that was attributed, or attribute this one",
            )
        )
