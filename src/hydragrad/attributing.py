"""The verb: plans, sweeps, checks, returns the answer."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from hydragrad.attribution import Attribution
from hydragrad.checks import Checks, finite_differences, judge
from hydragrad.derivatives import derivative_error
from hydragrad.diagnostics import Diagnostics
from hydragrad.errors import MismatchError, message
from hydragrad.hypergradient.engines import check_method
from hydragrad.hypergradient.pages import kept_pages
from hydragrad.hypergradient.queries import Columns, Queries
from hydragrad.hypergradient.reverse import direction_of, hessian_free_sweep, reverse_sweep, start
from hydragrad.hypergradient.scaled import ScaledEngine
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tokens import longest
from hydragrad.hypergradient.watch import Watch
from hydragrad.planning import Plan, plan_sweep
from hydragrad.resuming import Piece, Pieces, digest, qualified, summary
from hydragrad.run import Run, kept_random_state
from hydragrad.scoring import Rows, Scores
from hydragrad.trajectory.moments import Backwards
from hydragrad.trajectory.state import State
from hydragrad.verification import repeated_step

DRIFT = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative drift of a replay from the record that is still rounding."""


def attribute(
    run: Run,
    queries: Any,
    *,
    method: str = "exact",
    measurement: Callable[[nn.Module, Any], Tensor] | None = None,
    aggregate: str | Tensor | Sequence[int] | None = None,
    groups: Tensor | Sequence[int] | None = None,
    by_epoch: bool = False,
    train: Tensor | Sequence[int] | None = None,
    tokens: bool = False,
    step: int | None = None,
    memory: int | None = None,
    block: int | None = None,
    compile: bool | None = None,
    check: bool = True,
    seed: int = 0,
    progress: bool = True,
    resume: str | Path | None = None,
) -> Attribution:
    """Scores of every training example for every query, by one reverse sweep over the recorded run.

        score[i, j] = - d m_j / d eps_i        at eps = 0

    ``queries``: a data set or list of samples, collated as the training data was; ``method``: "exact" (the Hessian),
    "gauss-newton" (J^T H J), "hessian-free" (0, the paper's approximation); ``measurement(model, batch) -> [m]``: what
    is asked (default: the loss); ``aggregate``: "mean", "sum" or a group per query; ``groups``: a group per training
    example, whose scores are summed ([G, M]); ``by_epoch``: keep epochs apart ([E, N, M]); ``train``: rows wanted;
    ``tokens``: keep the tokens of a loss [b, L] apart ([N, L, M]; 0 where a batch had fewer; their sums are [N, M]);
    ``step``: ask the model of that step; ``memory``: bytes above training's; ``block``, ``compile``: see ``plan``;
    ``check``: compare with retraining (four replays) under ``seed``; ``progress``: show a bar; ``resume``: a folder in
    which finished blocks of queries are kept: the same call, made again after a kill, goes on from there and ends bit
    for bit as it would have (another question in that folder is refused, and the difference named).

    Raises MismatchError, UnsupportedError, NonFiniteError, StoreError (``resume``). Source: HYDRA, arXiv 2102.02515.
    Example: ``hydragrad.attribute(run, test_set).top(query=3, k=10)``.
    """
    began = time.perf_counter()
    check_method(method)
    sweep = Sweep.of(run, step, tokens=tokens)
    wanted = _Wanted.of(sweep, method, queries, measurement, aggregate, Rows.make(run, groups, train))
    scores = wanted.scores(by_epoch, groups is not None)
    question = wanted.question(measurement, by_epoch, block, compile) if resume else {}
    with kept_random_state(), kept_pages(), Pieces(resume, question) if resume else nullcontext() as pieces:
        plan = plan_sweep(
            sweep,
            wanted.columns.count,
            method,
            rows=scores.height,
            memory=memory,
            block=block,
            compile=compile,
            pieces=pieces is not None,
            again=pieces.plan if pieces is not None else None,
        )
        watch = _sweep(wanted, scores, plan, progress, pieces)
        swept = time.perf_counter() - began
        checks = _check(wanted, scores, plan, watch, seed) if check else Checks()
    seconds = time.perf_counter() - began
    diagnostics = _diagnose(wanted, plan, watch, checks, seconds, seconds - swept if check else 0.0, seed)
    ids = torch.arange(wanted.columns.count)
    return Attribution(scores.result(), wanted.rows.ids, ids, method, diagnostics, tokens)


@final
@dataclass(frozen=True)
class _Wanted:
    """What one call asks: of a run ready for sweeps, by a method, for these queries, columns and rows."""

    sweep: Sweep
    method: str
    queries: Queries
    columns: Columns
    rows: Rows

    @staticmethod
    def of(sweep: Sweep, method: str, queries: Any, measurement: Any, aggregate: Any, rows: Rows) -> "_Wanted":
        asked = Queries(
            sweep.run.problem,
            queries,
            sweep.objective.names,
            measurement,
            sweep.replayer.device,
            sweep.run.trajectory.manifest.collate["mode"],
            sweep.objective.carried,
        )
        named = isinstance(aggregate, str) or aggregate is None
        columns = Columns.make(aggregate if named else torch.as_tensor(aggregate), asked.count)
        return _Wanted(sweep, method, asked, columns, rows)

    def scores(self, by_epoch: bool, grouped: bool) -> Scores:
        """Zeros for the result, with an axis of tokens if the sweep tells them apart."""
        sweep, length = self.sweep, 0
        if sweep.tokens and grouped:
            raise MismatchError(
                message("groups and tokens together", remedy="sum the scores of the tokens over groups yourself")
            )
        if sweep.tokens:
            with kept_random_state():
                length = longest(sweep)
        return Scores(sweep.run, sweep.stop, self.rows, self.columns.count, by_epoch, sweep.dtype, length)

    def question(
        self, measurement: Callable[..., Any] | None, by_epoch: bool, block: int | None, compile: bool | None
    ) -> dict[str, Any]:
        """What tells one call of ``attribute`` from another, by name, in plain values."""
        with kept_random_state():
            measured = summary(self.queries.values(self.sweep.end()))
        return {
            "run": self.sweep.run.trajectory.identity,
            "step": self.sweep.stop,
            "method": self.method,
            "queries": self.queries.digest(),
            "aggregate": digest(self.columns.of, self.columns.factor),
            "measurement": qualified(measurement),
            "measured": measured,
            "rows (groups or train)": digest(self.rows.of, self.rows.ids),
            "by_epoch": by_epoch,
            "tokens": self.sweep.tokens,
            "block": block,
            "compile": compile,
            "dtype": str(self.sweep.dtype),
            "device": str(self.sweep.replayer.device),
            "torch": torch.__version__,
        }


def _check(wanted: _Wanted, scores: Scores, plan: Plan, watch: Watch, seed: int) -> Checks:
    """The ladder of retraining, the error of torch's own derivatives on one batch, a step repeated if any drifted."""
    sweep, total = wanted.sweep, scores.total()
    drifted = min((step for step, drift in watch.drift.items() if drift), default=None)
    return Checks(
        derivatives=derivative_error(sweep.objective, plan.chosen.point, wanted.method),
        found=finite_differences(sweep.run, wanted.queries, wanted.columns, total, wanted.rows.of, sweep.stop, seed),
        unsteady=None if drifted is None else repeated_step(sweep.run, sweep.run.trajectory.nearest(drifted - 1)),
    )


def _diagnose(
    wanted: _Wanted,
    plan: Plan,
    watch: Watch,
    checks: Checks,
    seconds: float,
    check_seconds: float,
    seed: int,
) -> Diagnostics:
    """What was seen on the way, with a verdict."""
    drift, found = max(watch.drift.values(), default=0.0), checks.found
    verdict, reasons = judge(wanted.method, checks, watch.growth, drift, DRIFT[wanted.sweep.dtype])
    return Diagnostics(
        method=wanted.method,
        seconds=seconds,
        check_seconds=check_seconds,
        replay_seconds=plan.chosen.replay * wanted.sweep.stop,
        drift=drift,
        growth=watch.growth,
        derivative_error=checks.derivatives,
        gradient_gap=plan.gradient_gap,
        plan=str(plan),
        verdict=verdict,
        reasons=reasons,
        ladder=found.ladder if found else (),
        examples=found.examples if found else (),
        seed=seed,
        growth_by_step=tuple(sorted(watch.growths.items())),
        drift_by_checkpoint=tuple(sorted(watch.drift.items())),
        range=found.range if found else None,
        nondeterminism=str(checks.unsteady or ""),
    )


def _sweep(wanted: _Wanted, scores: Scores, plan: Plan, progress: bool, pieces: Pieces | None) -> Watch:
    """Sweep back once for every block of queries that the plan carries together, or that no earlier call finished."""
    sweep, columns = wanted.sweep, wanted.columns
    if pieces is not None:
        pieces.begin(plan.fixed)
    watch = Watch(sweep.stop, plan.sweeps, sweep.objective.names, progress)
    end = sweep.end()
    with watch.bar, sweep.objective.differentiable():
        for first in range(0, columns.count, plan.carried):
            chosen = slice(first, min(first + plan.carried, columns.count))
            piece = pieces.load(chosen, scores.part(chosen)) if pieces is not None else None
            if piece is not None:
                scores.part(chosen).copy_(piece.values)
                watch.skip(sweep.stop, piece.growths, piece.drift)
                continue
            _sweep_block(wanted, scores, plan, watch, end, chosen)
            if pieces is not None:
                pieces.save(chosen, Piece(scores.part(chosen), watch.growths, watch.drift))
    return watch


def _sweep_block(wanted: _Wanted, scores: Scores, plan: Plan, watch: Watch, end: State, chosen: slice) -> None:
    """One sweep for the chosen columns, from the sensitivities at the end to the finished scores."""
    sweep, engine = wanted.sweep, plan.chosen.engine
    slopes, of_buffers = wanted.queries.sensitivities(end, wanted.columns, chosen)
    adjoint = start(slopes, sweep.optimizer.slots(sweep.run.steps[sweep.stop - 1].groups), of_buffers)
    del slopes, of_buffers
    scores.open(chosen, sweep.replayer.device)
    moments = Backwards(sweep.replayer, sweep.run.trajectory, sweep.stop, plan.segment)
    common = (adjoint, min(plan.block, chosen.stop - chosen.start), scores.add, watch)
    if isinstance(engine, ScaledEngine):
        watch.begin(direction_of(adjoint, sweep.optimizer))
        hessian_free_sweep(moments, sweep.objective, sweep.optimizer, engine, *common)
    else:
        watch.begin(adjoint)
        reverse_sweep(moments, sweep.objective, sweep.optimizer, engine, *common)
    scores.close(chosen)
    watch.drifted(moments.drift)
