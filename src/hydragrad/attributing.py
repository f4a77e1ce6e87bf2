"""The verb: plans, sweeps, checks, returns the answer."""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from tqdm import tqdm

from hydragrad.attribution import Attribution
from hydragrad.checks import derivative_error, finite_differences, judge
from hydragrad.diagnostics import Diagnostics
from hydragrad.errors import MismatchError, NonFiniteError, message
from hydragrad.hypergradient.engines import check_method
from hydragrad.hypergradient.finite import FirstBad
from hydragrad.hypergradient.pages import kept_pages
from hydragrad.hypergradient.queries import Columns, Queries, example_ids, group_numbers
from hydragrad.hypergradient.reverse import Adjoint, Direction, direction_of, hessian_free_sweep, reverse_sweep, start
from hydragrad.hypergradient.scaled import ScaledEngine
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.planning import Plan, plan_sweep
from hydragrad.resuming import Piece, Pieces, digest, qualified, summary
from hydragrad.run import Run, kept_random_state
from hydragrad.trajectory.moments import Backwards

DRIFT = {torch.float32: 1e-4, torch.float64: 1e-10}
"""Relative drift of a replay from the record that is still rounding."""

_LOOKED_AT_ALWAYS = 2**21
"""Numbers of adjoints up to which every step is looked at; a pass over more costs, and fifty times a sweep it is."""


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
    ``step``: ask the model of that step; ``memory``: bytes above training's; ``block``, ``compile``: see ``plan``;
    ``check``: compare with retraining (four replays) under ``seed``; ``progress``: show a bar; ``resume``: a folder in
    which finished blocks of queries are kept: the same call, made again after a kill, goes on from there and ends bit
    for bit as it would have (another question in that folder is refused, and the difference named).

    Raises MismatchError, UnsupportedError, NonFiniteError, StoreError (``resume``). Source: HYDRA, arXiv 2102.02515.
    Example: ``hydragrad.attribute(run, test_set).top(query=3, k=10)``.
    """
    began = time.perf_counter()
    check_method(method)
    sweep = Sweep.of(run, step)
    manifest = run.trajectory.manifest
    asked = Queries(
        run.problem,
        queries,
        sweep.objective.names,
        measurement,
        sweep.replayer.device,
        manifest.collate["mode"],
        sweep.objective.carried,
    )
    columns = Columns.make(
        aggregate if isinstance(aggregate, str) or aggregate is None else torch.as_tensor(aggregate), asked.count
    )
    rows = Rows.make(run, groups, train)
    scores = _Scores(run, sweep.stop, rows, columns.count, by_epoch, sweep.dtype)
    question = _question(sweep, asked, columns, rows, method, measurement, by_epoch, block, compile) if resume else {}
    with kept_random_state(), kept_pages(), Pieces(resume, question) if resume else nullcontext() as pieces:
        plan = plan_sweep(
            sweep,
            columns.count,
            method,
            rows=scores.height,
            memory=memory,
            block=block,
            compile=compile,
            pieces=pieces is not None,
            again=pieces.plan if pieces is not None else None,
        )
        swept = _sweep(sweep, asked, columns, scores, plan, progress, pieces)
        found, derivatives, check_began = None, None, time.perf_counter()
        if check:
            derivatives = derivative_error(sweep.objective, plan.chosen.point, method)
            total = scores.values.sum(0)
            found = finite_differences(run, asked, columns, total, rows.of, sweep.stop, seed)
    now = time.perf_counter()
    drift = max(swept.drift.values(), default=0.0)
    verdict, reasons = judge(method, found, swept.growth, drift, DRIFT[sweep.dtype], derivatives)
    diagnostics = Diagnostics(
        method=method,
        seconds=now - began,
        check_seconds=now - check_began if check else 0.0,
        replay_seconds=plan.chosen.replay * sweep.stop,
        drift=drift,
        growth=swept.growth,
        derivative_error=derivatives,
        gradient_gap=plan.gradient_gap,
        plan=str(plan),
        verdict=verdict,
        reasons=reasons,
        ladder=found.ladder if found else (),
        examples=found.examples if found else (),
        seed=seed,
    )
    values = scores.values if by_epoch else scores.values[0]
    return Attribution(values, rows.ids, torch.arange(columns.count), method, diagnostics)


def _question(
    sweep: Sweep,
    asked: Queries,
    columns: Columns,
    rows: "Rows",
    method: str,
    measurement: Callable[..., Any] | None,
    by_epoch: bool,
    block: int | None,
    compile: bool | None,
) -> dict[str, Any]:
    """What tells one call of ``attribute`` from another, by name, in plain values."""
    with kept_random_state():
        measured = summary(asked.values(sweep.end()))
    return {
        "run": sweep.run.trajectory.identity,
        "step": sweep.stop,
        "method": method,
        "queries": asked.digest(),
        "aggregate": digest(columns.of, columns.factor),
        "measurement": qualified(measurement),
        "measured": measured,
        "rows (groups or train)": digest(rows.of, rows.ids),
        "by_epoch": by_epoch,
        "block": block,
        "compile": compile,
        "dtype": str(sweep.dtype),
        "device": str(sweep.replayer.device),
        "torch": torch.__version__,
    }


@final
class Rows:
    """Which row of the result each training example counts in: ``of`` int64 [N], -1 for none; ``ids`` of the rows."""

    def __init__(self, of: Tensor, ids: Tensor) -> None:
        self.of, self.ids = of, ids
        self.whole = torch.equal(of, torch.arange(len(of)))  # every example its own row: nothing to look up

    @staticmethod
    def make(run: Run, groups: Any, train: Any) -> "Rows":
        count = run.num_examples
        if groups is not None and train is not None:
            raise MismatchError(message("groups and train together", remedy="give one of them"))
        if groups is not None:
            numbers, _, height = group_numbers(groups, count, "groups", "training example")
            return Rows(numbers, torch.arange(height))
        if train is None:
            return Rows(torch.arange(count), torch.arange(count))
        ids = example_ids(train, count, "train")
        if len(ids.unique()) != len(ids):
            raise MismatchError(
                message("train names an example twice", expected="different integers", got=ids.tolist()[:8])
            )
        of = torch.full((count,), -1, dtype=torch.int64)
        of[ids] = torch.arange(len(ids))
        return Rows(of, ids)


@final
class _Scores:
    """The result in the making, [E or 1, R, M]; while a sweep lasts, its columns are kept on the device."""

    def __init__(self, run: Run, stop: int, rows: Rows, columns: int, by_epoch: bool, dtype: torch.dtype) -> None:
        last = max(max(record.epochs or (record.epoch,)) for record in run.steps[:stop])
        epochs = last + 1 if by_epoch else 1
        self.by_epoch = by_epoch
        self.rows = rows
        self.values = torch.zeros(epochs, len(rows.ids), columns, dtype=dtype)
        self.height = epochs * len(rows.ids)
        self._open: Tensor | None = None

    def open(self, columns: slice, device: torch.device) -> None:
        """Begin a sweep for these columns."""
        width = columns.stop - columns.start
        direct = device.type == "cpu" and width == self.values.shape[2]
        self._open = self.values if direct else self.values.new_zeros(*self.values.shape[:2], width, device=device)

    def add(self, ids: Tensor, chosen: slice, terms: Tensor, epoch: int) -> None:
        """Subtract terms [k, b] (summed over tokens) from the rows of ``ids``."""
        assert self._open is not None
        terms = terms.flatten(2).sum(2) if terms.dim() > 2 else terms
        target = self._open[epoch if self.by_epoch else 0]
        at = ids if self.rows.whole else self.rows.of[ids]
        if not self.rows.whole and bool((at < 0).any()):
            kept = at >= 0
            at, terms = at[kept], terms[:, kept.to(terms.device)]
        target[:, chosen].index_add_(0, at.to(target.device), terms.T, alpha=-1)

    def part(self, columns: slice) -> Tensor:
        """The scores of these columns, as a view."""
        return self.values[:, :, columns]

    def close(self, columns: slice) -> None:
        """End the sweep: copy to the result; refuse NaN and infinities."""
        assert self._open is not None
        if self._open is not self.values:
            self.values[:, :, columns] = self._open.cpu()
        self._open = None
        bad = (~self.values[:, :, columns].isfinite()).nonzero()
        if len(bad):
            row, column = int(self.rows.ids[bad[0, 1]]), columns.start + int(bad[0, 2])
            raise NonFiniteError(
                message(
                    "the scores are not finite",
                    expected="finite numbers",
                    got=f"NaN or infinity, first for training example (or group) {row} and query {column}",
                    cause="the adjoint overflowed (an unstable run), or a loss with an infinite second derivative",
                    remedy="try method='gauss-newton', which is stable, or ask an earlier step with step=",
                )
            )


@final
class _Watch:
    """Follows a sweep: its bar, and how far the adjoint grows."""

    def __init__(self, steps: int, sweeps: int, names: Sequence[str], progress: bool) -> None:
        self._bad = FirstBad(names)
        self.every = max(1, steps // 50)
        self.growth, self.drift = 0.0, dict[int, float]()
        self.bar = tqdm(total=steps * sweeps, desc="sweeping back", unit="step", delay=2, disable=not progress)
        self._first: Tensor | None = None
        self._small = True

    def begin(self, adjoint: Adjoint | Direction) -> None:
        self._first = adjoint.norms()
        self._small = sum(x.numel() for x in adjoint.parts()) <= _LOOKED_AT_ALWAYS

    def skip(self, steps: int, piece: Piece) -> None:
        """A piece was finished by an earlier call."""
        self.bar.update(steps)
        self.growth = max(self.growth, piece.growth)
        self.drift[-1] = max(self.drift.get(-1, 0.0), piece.drift)

    def __call__(self, step: int, adjoint: Adjoint | Direction) -> None:
        self.bar.update()
        looked_at = not step % self.every
        if looked_at or self._small:
            self._bad.see(step, adjoint.parts())
        if not looked_at:
            return
        assert self._first is not None
        if found := self._bad.first():
            at, names = found
            raise NonFiniteError(
                message(
                    f"the adjoint is not finite at step {at}, first in parameter {names[0]!r}",
                    expected="finite derivatives back to the first step",
                    got=f"NaN or infinity in {len(names)} of {len(adjoint.parts())} parameters",
                    cause="an unstable run: its derivative grows at every step back",
                    remedy="try method='gauss-newton' or 'hessian-free', or ask an earlier step with step=",
                )
            )
        self.growth = max(self.growth, float((adjoint.norms() / self._first.clamp_min(1e-30)).max()))


def _sweep(
    sweep: Sweep,
    asked: Queries,
    columns: Columns,
    scores: _Scores,
    plan: Plan,
    progress: bool,
    pieces: Pieces | None,
) -> _Watch:
    if pieces is not None:
        pieces.begin(plan.fixed)
    watch = _Watch(sweep.stop, plan.sweeps, sweep.objective.names, progress)
    engine, device = plan.chosen.engine, sweep.replayer.device
    end = sweep.end()
    slots = sweep.optimizer.slots(sweep.run.steps[sweep.stop - 1].groups)
    with watch.bar, sweep.objective.differentiable():
        for first in range(0, columns.count, plan.carried):
            chosen = slice(first, min(first + plan.carried, columns.count))
            piece = pieces.load(chosen, scores.part(chosen)) if pieces is not None else None
            if piece is not None:
                scores.part(chosen).copy_(piece.values)
                watch.skip(sweep.stop, piece)
                continue
            slopes, of_buffers = asked.sensitivities(end, columns, chosen)
            adjoint = start(slopes, slots, of_buffers)
            del slopes, of_buffers
            scores.open(chosen, device)
            moments = Backwards(sweep.replayer, sweep.run.trajectory, sweep.stop, plan.segment)
            common = (adjoint, min(plan.block, chosen.stop - chosen.start), scores.add, watch)
            if isinstance(engine, ScaledEngine):
                watch.begin(direction_of(adjoint, sweep.optimizer))
                hessian_free_sweep(moments, sweep.objective, sweep.optimizer, engine, *common)
            else:
                watch.begin(adjoint)
                reverse_sweep(moments, sweep.objective, sweep.optimizer, engine, *common)
            scores.close(chosen)
            watch.drift |= moments.drift
            if pieces is not None:
                drift = max(watch.drift.values(), default=0.0)
                pieces.save(chosen, Piece(scores.part(chosen), watch.growth, drift))
            del adjoint, moments, common  # before the next block's sensitivities are made
    return watch
