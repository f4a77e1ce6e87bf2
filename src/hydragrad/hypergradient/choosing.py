"""Choosing an engine and a block size for the work at hand, from short measurements that pay for themselves."""

import itertools
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from hydragrad.hypergradient.consistency import check_buffers, gradient_gap
from hydragrad.hypergradient.costs import activation_bytes, probe_block, products, seconds_of
from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.embeddings import check_embeddings
from hydragrad.hypergradient.naming import named
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.scaled import Direct, ScaledEngine
from hydragrad.hypergradient.searching import Search
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.step.forms import form_of
from hydragrad.step.objective import Point
from hydragrad.trajectory.moments import Moment, advance
from hydragrad.trajectory.state import State

_RANDOM = 10_000
"""Bytes of the random states in a stored state."""


@final
@dataclass(frozen=True)
class Sizes:
    """Bytes of one number, a query's adjoint, a kept state, the engine's work per query; ``longest`` stretch.

    ``stored``: bytes of a state on disk; ``made``: of what a sweep makes once, whatever is chosen.
    """

    number: int
    adjoint: int
    state: int
    engine: int
    longest: int
    stored: int = 0
    made: int = 0


@final
@dataclass(frozen=True)
class Chosen:
    """The engine with its block, seconds a query and step, seconds a replayed step, sizes, why, where it was tried.

    ``gradient_gap``: how far the gradient that is differentiated there is from the training step's, relatively.
    ``held``: bytes that the engine keeps from block to block of one step.
    """

    engine: Engine | ScaledEngine
    block: int
    per_query: float
    replay: float
    sizes: Sizes
    reasons: tuple[str, ...]
    point: Point
    gradient_gap: float
    held: int = 0

    @property
    def plain(self) -> Engine:
        """The engine that gives curvature products, for the forward sweep."""
        engine = self.engine.engine if isinstance(self.engine, Direct) else self.engine
        assert isinstance(engine, Engine)
        return engine

    def limited(self, carried: int) -> "Chosen":
        """With a block of at most ``carried``."""
        return replace(self, block=min(self.block, carried))


@final
@dataclass(frozen=True)
class Fixed:
    """What an earlier sweep chose, to be done again in the same way: bit for bit where the machine is the same.

    ``engine``: "plain", "traced" or "compiled", a colon, the engine's name; the rest as in a plan.
    """

    engine: str
    block: int
    carried: int
    segment: int
    on_disk: int = 0


def choose(sweep: Sweep, queries: int, method: str, *, memory: int, block: int | None, compile: bool | None) -> Chosen:
    """Measure engines of ``method`` on a recorded batch until measuring would cost more than it saves.

    Blocks that are tried take at most half of ``memory`` (bytes), what is chosen as well.
    """
    point, replay, gap = _probe_point(sweep)
    form = form_of((point.params, point.batch, point.carried), [])
    memo = sweep.run.memo.setdefault(("measured", method, form, sweep.objective.names, sweep.objective.mode), {})
    with sweep.objective.differentiable():
        if "sizes" not in memo:
            if method == "gauss-newton":
                sweep.objective.check_split(point)
            memo["sizes"] = _sizes(sweep, point, method)
        sizes: Sizes = replace(memo["sizes"], longest=_longest(sweep))
        search = Search(sweep, point, method, memo)
        best = search.best(queries, max(1, memory // 2 // sizes.engine), memory // 4, fixed=block, compile=compile)
    held = best.engine.held(point)
    return Chosen(best.engine, best.block, best.per_query, replay, sizes, tuple(search.reasons), point, gap, held)


def fixed(sweep: Sweep, method: str, engine: str, block: int) -> Chosen:
    """The engine of that name (see ``Fixed``), measured once with that block and compared with nothing."""
    point, replay, gap = _probe_point(sweep)
    key = ("fixed", method, engine, block, sweep.stop)
    with sweep.objective.differentiable():
        if key not in sweep.run.memo:
            sweep.run.memo[key] = named(sweep.objective, method, engine, elementwise=sweep.elementwise)
        made, sizes = sweep.run.memo[key], _sizes(sweep, point, method)
        gam = probe_block(point, block)
        products(made, point, gam)  # the first form: it alone is traced or compiled
        seconds = seconds_of(lambda: products(made, replace(point), gam), sweep.replayer.device, repeats=1)
    return Chosen(made, block, seconds / block, replay, sizes, (), point, gap, made.held(point))


def _probe_point(sweep: Sweep) -> tuple[Point, float, float]:
    """A point at the last checkpoint before the end, the seconds of one replayed step there, and its gradient gap."""
    trajectory = sweep.run.trajectory
    starts = [t for t in trajectory.checkpoints if t < sweep.stop]
    # the latest of those with the largest batch: the last batch of an epoch is not what most steps look like
    start = max(starts, key=lambda t: (len(trajectory.steps[t].batches[0]), t))
    state, record = trajectory.state(start), trajectory.steps[start]
    replayer = sweep.replayer

    gradient: dict[str, Tensor] = {}

    def step() -> None:
        replayer.restore(state)
        gradient.update(advance(replayer, record))

    key = ("probed", start, sweep.objective.names, sweep.gap_limit)
    known = key in sweep.run.memo
    seconds = 0.0
    if not known:
        _check_buffers(sweep, starts)
    if not known or record.random:  # a step that draws leaves its random states with the replayer
        seconds = seconds_of(step, replayer.device, repeats=2)
    points = points_at(sweep, state, gradient)
    if not known:
        check_embeddings(sweep.objective, points[0])
        flowing = {name: g for name, g in gradient.items() if name not in record.frozen}
        sweep.run.memo[key] = (seconds, gradient_gap(sweep.objective, points, flowing, sweep.gap_limit))
    replay, gap = sweep.run.memo[key]
    return max(points, key=lambda point: bool(point.coefficients.any())), replay, gap  # the first that was not skipped


def points_at(sweep: Sweep, state: State, gradient: dict[str, Tensor]) -> list[Point]:
    """The points of the step from ``state``, which the replayer took last."""
    replayer, record = sweep.replayer, sweep.run.trajectory.steps[state.step]
    batches = [*replayer.batches(record), *replayer.passed(record)]
    moment = Moment(record, state_on(state, replayer.device), gradient, batches, replayer.random)
    return [point for _, _, point in points_of(moment, sweep.objective)]


def _check_buffers(sweep: Sweep, starts: list[int]) -> None:
    """``check_buffers`` at the first of ``starts``, where buffers move most, and at one in each other set of modes."""
    if not sweep.objective.carried:
        return
    steps, replayer = sweep.run.trajectory.steps, sweep.replayer
    firsts = {frozenset(steps[t].modes.items()): t for t in reversed(starts)}
    for start in firsts.values():
        state = sweep.run.trajectory.state(start)
        replayer.restore(state)
        gradient = advance(replayer, steps[start])
        left = replayer.state(slots=False).buffers
        last = points_at(sweep, state, gradient)[-1]
        check_buffers(sweep.objective, last, state.buffers, left, sweep.gap_limit, sweep.run.half_precision)


def state_on(state: State, device: torch.device) -> State:
    """The state with parameters and buffers on the device."""
    return replace(
        state,
        params={name: x.to(device) for name, x in state.params.items()},
        buffers={name: x.to(device) for name, x in state.buffers.items()},
    )


def _sizes(sweep: Sweep, point: Point, method: str) -> Sizes:
    number = point.params[0].element_size()
    size = sum(p.numel() for p in point.params) * number
    buffers = sum(v.nbytes for v in point.carried)
    state_slots = sum(p.numel() * len(names) for p, names in zip(point.params, sweep.slots, strict=True)) * number
    activations = activation_bytes(sweep.objective, point)
    whole = sum(x.nbytes for x in (*sweep.objective.module.parameters(), *sweep.objective.module.buffers()))
    stored = whole + state_slots + _RANDOM
    unread = state_slots if sweep.optimizer.update.linear else 0  # of a state at a step: see Backwards
    factor = {"exact": 4, "gauss-newton": 3, "hessian-free": 2}[method]
    return Sizes(
        number=number,
        adjoint=(size if method == "hessian-free" and sweep.elementwise else size + state_slots) + buffers,
        state=stored + size - unread,
        # gam, its parts that the engine copies, C gam; for adaptive optimizers the update's successors (measured)
        engine=factor * activations + 5 * size + (0 if sweep.optimizer.update.linear else size + state_slots),
        longest=_longest(sweep),
        stored=stored,
        # the replayer and its gradients, copies of the model for objective and queries, the state asked about, the
        # point of the measurements; the recorded state that the replay of a stretch is compared with; the slots of the
        # state that it starts from
        made=(whole + state_slots + size) + 2 * whole + (whole + state_slots) + size + stored + unread,
    )


def _longest(sweep: Sweep) -> int:
    """The longest stretch between two checkpoints."""
    marks = [t for t in sweep.run.trajectory.checkpoints if t < sweep.stop] + [sweep.stop]
    return max(b - a for a, b in itertools.pairwise(marks))
