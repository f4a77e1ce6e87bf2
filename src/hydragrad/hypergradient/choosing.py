"""Choosing an engine and a block size for the work at hand, from short measurements that pay for themselves."""

import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from hydragrad.errors import UnsupportedError
from hydragrad.hypergradient.costs import Timed, activation_bytes, agree, probe_block, products, seconds_of
from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.engines import candidates, reference
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.scaled import Direct, PerExampleGradients, ScaledEngine
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tracing import Traced
from hydragrad.step.objective import Point
from hydragrad.trajectory.moments import Moment
from hydragrad.trajectory.state import State

_SHARE = 0.15
"""Part of the predicted time that measuring may take."""
_BLOCKS = (1, 4, 16, 64, 128)
_START, _WIDEST, _COMPILED_BLOCK = 16, 512, 64
_TRACING, _TRACING_SHARE = 40, 0.35
"""Tracing costs about this many runs of what is traced, and is worth up to this part of the predicted time."""
_COMPILE_SECONDS = 40.0
"""What torch.compile is expected to cost; it is tried where half of the predicted time is more than that."""


@final
@dataclass(frozen=True)
class Sizes:
    """Bytes of one number, a query's adjoint, a kept state, the engine's work per query; ``longest`` stretch."""

    number: int
    adjoint: int
    state: int
    engine: int
    longest: int


@final
@dataclass(frozen=True)
class Chosen:
    """The engine with its block, seconds a query and step, seconds a replayed step, sizes, why, where it was tried."""

    engine: Engine | ScaledEngine
    block: int
    per_query: float
    replay: float
    sizes: Sizes
    reasons: tuple[str, ...]
    point: Point

    @property
    def plain(self) -> Engine:
        """The engine that gives curvature products, for the forward sweep."""
        engine = self.engine.engine if isinstance(self.engine, Direct) else self.engine
        assert isinstance(engine, Engine)
        return engine

    def limited(self, carried: int) -> "Chosen":
        """With a block of at most ``carried``."""
        return replace(self, block=min(self.block, carried))


def choose(sweep: Sweep, queries: int, method: str, *, memory: int, block: int | None, compile: bool | None) -> Chosen:
    """Measure engines of ``method`` on a recorded batch until measuring would cost more than it saves.

    Blocks that are tried take at most half of ``memory`` (bytes), what is chosen as well.
    """
    point, replay = _probe_point(sweep)
    with sweep.objective.differentiable():
        if method == "gauss-newton":
            sweep.objective.check_split(point)
        sizes = _sizes(sweep, point, method)
        widest = max(1, memory // 2 // sizes.engine)
        search = _Search(sweep, point, queries, widest, method, block)
        search.run(compile)
    best = search.best
    return Chosen(best.engine, best.block, best.per_query, replay, sizes, tuple(search.reasons), point)


@final
class _Search:
    """The best engine and block size found so far, starting from the reference: plain autograd."""

    def __init__(self, sweep: Sweep, point: Point, queries: int, widest: int, method: str, block: int | None) -> None:
        self.objective, self.point, self.method = sweep.objective, point, method
        self.total, self.queries = queries, min(queries, widest)
        self.device = sweep.replayer.device
        self.steps = sweep.stop
        self.elementwise = sweep.elementwise
        self.memo: dict[Any, Any] = sweep.run.memo
        self.fixed = min(block, queries) if block else None
        self.reasons: list[str] = []
        self.began = time.perf_counter()
        base = reference(method, self.objective)
        one = probe_block(point, 1)
        self.truth = products(base, point, one)
        seconds = seconds_of(lambda: products(base, point, one), self.device, repeats=1)
        width = self.fixed or min(queries, _START)
        self.best = Timed(self._scaled(base), width, seconds * width)

    def run(self, compile: bool | None) -> None:
        """Engines as they are, at one size; then the best of them traced, at several; then compiled."""
        first = self.fixed or self._balanced(_START)
        plain: list[tuple[float, Engine]] = []
        coupled = bool(self.point.carried or self.point.draws)
        if self.method == "hessian-free" and self.elementwise and not coupled and self._pays(5 * self.best.per_query):
            engine = self._kept("per-example", lambda: PerExampleGradients(self.objective))
            self._try(engine, self.fixed or self._balanced(_WIDEST))
        for engine in candidates(self.method, self.objective):
            if self._pays(20 * self.best.per_query):
                timed = self._try(self._scaled(engine), first)
                if timed is not None:
                    plain.append((timed.seconds, engine))
        plain.sort(key=lambda pair: pair[0])
        for seconds, engine in plain:
            if ("traced", engine.name) in self.memo or self._pays(_TRACING * seconds, _TRACING_SHARE):
                self._try(self._scaled(self._traced(engine)), first)
        self._climb(first)
        if plain and self.method != "hessian-free" and compile is not False:
            engine = self._fusible(plain)
            half = 0.5 * self.steps * self.total * self.best.per_query
            # one size, whatever was measured: a compiled graph holds for its block, and serves later calls
            block = self.fixed or self._balanced(_COMPILED_BLOCK)
            key = ("compiled", engine.name, block)
            if compile or half > _COMPILE_SECONDS or key in self.memo:
                self._try(self._kept(key, lambda: Traced(engine, compile=True)), block, forced=bool(compile))

    def _scaled(self, engine: Engine) -> Engine | ScaledEngine:
        """Hessian-free engines serve through the sweep of fixed directions, where that holds."""
        return Direct(engine) if self.method == "hessian-free" and self.elementwise else engine

    @staticmethod
    def _fusible(plain: list[tuple[float, Engine]]) -> Engine:
        """Of the engines that work here, the one that gains most from fusion: forward over reverse (measured)."""
        return next((e for _, e in plain if e.name == "forward-over-reverse"), plain[0][1])

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """An object whose graphs serve later calls on the same run."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def _traced(self, engine: Engine) -> Traced:
        return self._kept(("traced", engine.name), lambda: Traced(engine))

    def _climb(self, first: int) -> None:
        """Larger block sizes of the best engine; if none is better, smaller ones."""
        if self.fixed or not getattr(_inner(self.best.engine), "batched", True) or self.best.block > first:
            return
        engine = self.best.engine
        sizes = sorted({self._balanced(size) for size in _BLOCKS if size <= self.queries})
        for way in ([s for s in sizes if s > first], [s for s in reversed(sizes) if s < first]):
            for size in way:
                if not self._pays(8 * size * self.best.per_query):
                    return
                self._try(engine, size)
            if self.best.block > first:
                return

    def _balanced(self, size: int) -> int:
        """The size at most this large that cuts the queries into equal blocks."""
        return -(-self.queries // -(-self.queries // min(size, self.queries)))

    def _pays(self, seconds: float, share: float | None = None) -> bool:
        """Whether another ``seconds`` of measuring are small against what is still to be done."""
        share = _SHARE if share is None else share
        spent = time.perf_counter() - self.began
        return spent + seconds < share * self.steps * self.total * self.best.per_query

    def _try(self, engine: Engine | ScaledEngine, size: int, *, forced: bool = False) -> Timed | None:
        """Compare an engine with the reference, time it at a size, keep it if it is the best."""
        gam = probe_block(self.point, size)
        try:
            found = products(engine, self.point, gam)
            first = None if found[0] is None else tuple(x[:1] for x in found[0])
            if not agree((first, found[1][:1], tuple(x[:1] for x in found[2])), self.truth):
                self.reasons.append(f"{engine!r} disagrees with plain autograd here and is not used")
                return None
            # a copy of the point each time: an engine may keep what it computed for a point
            timed = Timed(engine, size, seconds_of(lambda: products(engine, replace(self.point), gam), self.device))
        except (RuntimeError, NotImplementedError, TypeError, ValueError, UnsupportedError) as error:
            self.reasons.append(f"{engine!r} cannot differentiate this model ({_first_line(error)})")
            return None
        if forced or timed.per_query < self.best.per_query:
            self.best = timed
        return timed


def _inner(engine: Engine | ScaledEngine) -> Engine | ScaledEngine:
    return engine.engine if isinstance(engine, Direct) else engine


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]


def _probe_point(sweep: Sweep) -> tuple[Point, float]:
    """A point at the last checkpoint before the end, and the seconds of one replayed step there."""
    trajectory = sweep.run.trajectory
    starts = [t for t in trajectory.checkpoints if t < sweep.stop]
    # the latest of those with the largest batch: the last batch of an epoch is not what most steps look like
    start = max(starts, key=lambda t: (len(trajectory.steps[t].batches[0]), t))
    state, record = trajectory.state(start), trajectory.steps[start]
    replayer = sweep.replayer

    def step() -> None:
        replayer.restore(state)
        replayer.advance(record)

    replay = seconds_of(step, replayer.device, repeats=2)
    moment = Moment(record, state_on(state, replayer.device), {}, replayer.batches(record), replayer.random)
    _, _, point = next(points_of(moment, sweep.objective))
    return point, replay


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
    slots = sweep.optimizer.slots(sweep.run.steps[sweep.stop - 1].groups)
    state_slots = sum(p.numel() * len(names) for p, names in zip(point.params, slots, strict=True)) * number
    rest = sum(x.numel() * x.element_size() for x in point.rest.values())
    activations = activation_bytes(sweep.objective, point)
    marks = [t for t in sweep.run.trajectory.checkpoints if t < sweep.stop] + [sweep.stop]
    factor = {"exact": 4, "gauss-newton": 3, "hessian-free": 2}[method]
    return Sizes(
        number=number,
        adjoint=(size if method == "hessian-free" and sweep.elementwise else size + state_slots) + buffers,
        state=2 * size + state_slots + rest + buffers,
        # gam, its parts that the engine copies, C gam; for adaptive optimizers the update's successors (measured)
        engine=factor * activations + 5 * size + (0 if sweep.optimizer.update.linear else size + state_slots),
        longest=max(b - a for a, b in itertools.pairwise(marks)),
    )
