"""The verb: plans, sweeps, checks, returns the answer."""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from hydragrad.amounts import Amount
from hydragrad.asked import Asked
from hydragrad.attribution import Attribution
from hydragrad.checks import Checks, finite_differences, judge
from hydragrad.derivatives import worst_error
from hydragrad.diagnostics import Diagnostics, Smoothing
from hydragrad.errors import MismatchError, message
from hydragrad.hypergradient.engines import check_method
from hydragrad.hypergradient.pages import give_back, kept_pages
from hydragrad.hypergradient.queries import Columns, Queries
from hydragrad.hypergradient.reverse import direction_of, hessian_free_sweep, reverse_sweep, start
from hydragrad.hypergradient.scaled import ScaledEngine
from hydragrad.hypergradient.sweeping import Sweep, Way
from hydragrad.hypergradient.tokens import longest
from hydragrad.hypergradient.watch import Watch
from hydragrad.planning import Plan, plan_sweep
from hydragrad.resuming import Piece, Pieces, digest, qualified, summary
from hydragrad.run import Run, kept_random_state
from hydragrad.scoring import Rows, Scores
from hydragrad.slopes import slope_error
from hydragrad.smoothing import Runs, proved
from hydragrad.trajectory.identity import identity
from hydragrad.trajectory.moments import Backwards
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
    memory: Amount | None = None,
    disk: Amount | None = None,
    replays: float | None = None,
    block: int | None = None,
    compile: bool | None = None,
    check: bool = True,
    seed: int = 0,
    progress: bool = True,
    resume: str | Path | None = None,
    smoothing: int | None = None,
    fraction: float | None = None,
    weights: Tensor | None = None,
    drift_tolerance: float | None = None,
) -> Attribution:
    """Scores of every training example for every query, by one reverse sweep over the recorded run.

        score[i, j] = - d m_j / d eps_i        at eps = 0

    ``queries``: a data set or list of samples, collated as the training data was; ``method``: "exact" (the Hessian),
    "gauss-newton" (J^T H J), "hessian-free" (0, the paper's approximation); ``measurement(model, batch) -> [m]``: what
    is asked (default: the loss); ``aggregate``: "mean", "sum" or a group per query; ``groups``: a group per training
    example, whose scores are summed ([G, M]); ``by_epoch``: keep epochs apart ([E, N, M]); ``train``: rows, or a mask;
    ``tokens``: keep the tokens of a loss [b, L] apart ([N, L, M]; 0 where a batch had fewer; their sums are [N, M]);
    ``step``: ask the model of that step; ``memory``: budget above training's (bytes, or "2 GB"), ``disk``: for states
    in a temporary folder, ``replays``: how many times the run may be replayed, ``block``, ``compile``: see ``plan``;
    ``check``: compare with retraining (four replays) under ``seed``; ``progress``: show a bar; ``resume``: a folder in
    which finished blocks of queries are kept: the same call, made again after a kill, goes on from there and ends bit
    for bit as it would have (another question in that folder is refused, and the difference named); ``smoothing``: the
    mean of the scores of so many runs without a random ``fraction`` of the examples each (under ``seed``; None: about a
    tenth), for questions about many examples at once; ``weights`` [N]: the scores of one run with these weights;
    ``drift_tolerance``: how far the gradient that is differentiated may be from the training step's, relatively (None:
    rounding, and 0.05 for steps under autocast, which are differentiated in full precision; more is refused).

    Raises MismatchError, UnsupportedError, NonFiniteError, StoreError (``resume``). Source: HYDRA, arXiv 2102.02515.
    Example: ``hydragrad.attribute(run, test_set).top(query=3, k=10)``.
    """
    began = time.perf_counter()
    check_method(method)
    sweep = Sweep.of(run, step, tokens=tokens, drift_tolerance=drift_tolerance)
    runs = Runs.of(run.num_examples, smoothing, fraction, weights, seed)
    wanted = _Wanted.of(sweep, method, queries, measurement, aggregate, Rows.make(run, groups, train), runs)
    scores = wanted.scores(by_epoch, groups is not None)
    question = wanted.question(measurement, by_epoch, block, compile) if resume is not None else {}
    with kept_random_state(), kept_pages(), _kept(resume, question) as pieces:
        plan = plan_sweep(
            sweep,
            wanted.columns.count,
            method,
            rows=scores.height,
            memory=memory,
            disk=disk,
            replays=replays,
            block=block,
            compile=compile,
            pieces=pieces is not None,
            again=pieces.plan if pieces is not None else None,
            reweighted=len(runs),
        )
        wrong, slopes = worst_error(sweep, method), slope_error(wanted.queries, sweep.end())
        watch = _sweep(wanted, scores, plan, progress, pieces)
        rest = (tokens, identity(run.steps), Asked.of(wanted.measured(), sweep.stop, groups, measurement))
        swept = time.perf_counter() - began
        smoothed = None if runs.fraction is None else Smoothing(len(runs), runs.fraction, scores.spread)
        checks = Checks(None, wrong, slopes, None, smoothed, plan.gradient_gap, str(run.half_precision or ""))
        if check:
            checks = _check(wanted, scores, plan, watch, checks, seed, progress)
    seconds = time.perf_counter() - began
    diagnostics = _diagnose(wanted, plan, watch, checks, seconds, seconds - swept if check else 0.0, seed)
    return Attribution(scores.result(), wanted.rows.ids, torch.arange(wanted.columns.count), method, diagnostics, *rest)


def _kept(resume: str | Path | None, question: dict[str, Any]) -> AbstractContextManager[Pieces | None]:
    return nullcontext() if resume is None else Pieces(resume, question)


@final
@dataclass(frozen=True)
class _Wanted:
    """What one call asks: of a run ready for sweeps (or others near it), by a method, for these queries and rows."""

    sweep: Sweep
    method: str
    queries: Queries
    columns: Columns
    rows: Rows
    runs: Runs

    @staticmethod
    def of(
        sweep: Sweep, method: str, queries: Any, measurement: Any, aggregate: Any, rows: Rows, runs: Runs
    ) -> "_Wanted":
        asked = Queries(
            sweep.run.problem,
            queries,
            sweep.objective.names,
            measurement,
            sweep.replayer.device,
            sweep.run.trajectory.manifest.collate["mode"],
            sweep.objective.carried,
        )
        columns = Columns.make(aggregate, asked.count)
        return _Wanted(sweep, method, asked, columns, rows, runs)

    def measured(self) -> Tensor:
        """The value of every column at the end of the recorded run, float64 [M]."""
        return self.columns.collect(self.queries.values(self.sweep.end()))

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
        runs, columns = max(1, len(self.runs)), self.columns.count
        return Scores(sweep.run, sweep.stop, self.rows, columns, by_epoch, sweep.dtype, length, runs)

    def question(
        self, measurement: Callable[..., Any] | None, by_epoch: bool, block: int | None, compile: bool | None
    ) -> dict[str, Any]:
        """What tells one call of ``attribute`` from another, by name, in plain values."""
        with kept_random_state():
            measured = summary(self.queries.values(self.sweep.end()))
        weights = {} if self.runs.weights is None else {"weights (smoothing)": digest(self.runs.weights)}
        return weights | {
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


def _check(
    wanted: _Wanted, scores: Scores, plan: Plan, watch: Watch, known: Checks, seed: int, progress: bool
) -> Checks:
    """Retraining, and a step repeated if any drifted.

    Scores of one run face a ladder of small and whole removals there; means over several, what they are meant for.
    """
    sweep, weights, total = wanted.sweep, wanted.runs.weights, scores.total()
    drifted = min((step for step, drift in watch.drift.items() if drift), default=None)
    checks = replace(
        known,
        unsteady=None if drifted is None else repeated_step(sweep.run, sweep.run.trajectory.nearest(drifted - 1)),
    )
    given = (sweep.run, wanted.queries, wanted.columns, total, wanted.rows.of, sweep.stop, seed)
    if known.smoothing is not None and known.smoothing.fraction:
        return replace(checks, smoothing=proved(known.smoothing, *given, progress))
    return replace(checks, found=finite_differences(*given, None if weights is None else weights[0]))


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
        measurement_error=checks.slopes,
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
        smoothing=checks.smoothing,
        half_precision=checks.half.removeprefix("torch."),
    )


def _sweep(wanted: _Wanted, scores: Scores, plan: Plan, progress: bool, pieces: Pieces | None) -> Watch:
    """Sweep back over every run once for every block of queries that the plan carries together.

    What an earlier call finished is taken from its pieces, which count the columns of all runs in a row.
    """
    give_back()  # what planning and checks left free would stay beside what the sweep takes
    sweep, columns = wanted.sweep, wanted.columns.count
    if pieces is not None:
        pieces.begin(plan.fixed)
    forwards = sum(weights is not None for weights in wanted.runs)
    watch = Watch(sweep.stop, plan.sweeps + forwards, sweep.objective.names, progress)
    with watch.bar:
        for number, weights in enumerate(wanted.runs):
            way: Way | None = None
            for first in range(0, columns, plan.carried):
                chosen = slice(first, min(first + plan.carried, columns))
                place = slice(chosen.start + number * columns, chosen.stop + number * columns)
                piece = pieces.load(place, scores.part(chosen)) if pieces is not None else None
                if piece is not None:
                    scores.put(chosen, piece.values, piece.sizes)
                    watch.skip(sweep.stop, piece.growths, piece.drift)
                    continue
                way = sweep.way(weights, plan.segment, watch.bar.update) if way is None else way
                found, sizes = _sweep_block(wanted, scores, plan, watch, way, chosen, wanted.runs.counting(weights))
                scores.put(chosen, found, sizes)
                if pieces is not None:
                    pieces.save(place, Piece(found, watch.growths, watch.drift, sizes))
            watch.bar.update(sweep.stop if way is None and weights is not None else 0)
    scores.finish()
    return watch


def _sweep_block(
    wanted: _Wanted, scores: Scores, plan: Plan, watch: Watch, way: Way, chosen: slice, counting: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """One sweep for the chosen columns, from the sensitivities at the end to the finished scores and their sizes."""
    sweep, engine = wanted.sweep, plan.chosen.engine
    slopes, of_buffers = wanted.queries.sensitivities(way.end, wanted.columns, chosen)
    scores.open(chosen, sweep.replayer.device, counting)
    linear = sweep.optimizer.update.linear
    moments = Backwards(sweep.replayer, way.trajectory, sweep.stop, plan.segment, plan.on_disk, linear=linear)
    common = (min(plan.block, chosen.stop - chosen.start), scores.add, watch)
    if isinstance(engine, ScaledEngine):
        watch.begin(direction_of(slopes, sweep.slots, sweep.optimizer))
        hessian_free_sweep(moments.stretches(), sweep.objective, sweep.optimizer, engine, slopes, sweep.slots, *common)
    else:
        adjoint = start(slopes, sweep.slots, of_buffers)
        del slopes, of_buffers
        watch.begin(adjoint)
        reverse_sweep(moments.stretches(), sweep.objective, sweep.optimizer, engine, adjoint, *common)
    watch.drifted(moments.drift)
    return scores.close(chosen)
