"""Changes carried out: planned, in parallel, with a bar; what is kept in a folder is not done again."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from tqdm import tqdm

from hydragrad.errors import NonFiniteError, message
from hydragrad.retraining.counterfactual import Change
from hydragrad.retraining.ledger import Ledger
from hydragrad.retraining.measuring import Outcome, Retrainer
from hydragrad.retraining.planning import RetrainingPlan, plan_changes
from hydragrad.retraining.pool import default_threads, outcomes, workers


def carried_out(
    retrainer: Retrainer,
    changes: Sequence[Change],
    jobs: int | None,
    resume: str | Path | None,
    on_plan: Callable[[RetrainingPlan], None] | None,
    progress: bool,
) -> tuple[list[Outcome], RetrainingPlan]:
    """The outcome of every change, in order, and the plan.

    If the first is ``Change()``, as trained, it is done before the others: only if it gives the record's bits may they
    begin at a checkpoint. Raises NonFiniteError.
    """
    side_by_side, threads = workers(jobs), default_threads(jobs)
    ledger = None if resume is None else Ledger(resume, retrainer, threads)
    threads = threads if ledger is None else ledger.threads
    done = {k: kept for k, change in enumerate(changes) if ledger and (kept := ledger.get(change)) is not None}
    missing = [(k, change) for k, change in enumerate(changes) if k not in done]
    plan = plan_changes(retrainer, [change for _, change in missing], len(done), side_by_side, threads)
    if on_plan is not None:
        on_plan(plan)
    elif progress:
        tqdm.write(f"plan: {plan}", file=sys.stderr)
    bar = tqdm(total=len(changes), initial=len(done), desc="retraining", unit="run", disable=not progress)
    with bar:

        def carry_out(numbered: list[tuple[int, Change]], early: bool) -> None:
            for k, outcome in outcomes(retrainer, numbered, jobs=jobs, threads=threads, early=early):
                done[k] = outcome
                if ledger is not None:
                    ledger.put(changes[k], outcome)
                bar.update()

        as_trained = changes[0] == Change()
        if as_trained:
            carry_out([(k, change) for k, change in missing if k == 0], early=True)
            if not bool(done[0].values.isfinite().all()):
                raise NonFiniteError(
                    message(
                        "the model as trained has no finite measurements", cause="a diverged run, or a query with NaN"
                    )
                )
        rest = [(k, change) for k, change in missing if k > 0 or not as_trained]
        carry_out(rest, early=done[0].bitwise if as_trained else True)
    return [done[k] for k in range(len(changes))], plan
