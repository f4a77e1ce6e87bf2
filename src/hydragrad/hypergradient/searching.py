"""The search for an engine and a block size: what is known first, then short measurements that pay for themselves."""

import itertools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, final

import torch

from hydragrad.errors import UnsupportedError, message
from hydragrad.hypergradient.costs import Timed, agree, probe_block, probe_buffers, products, quick_seconds
from hydragrad.hypergradient.curvature import Engine, Products
from hydragrad.hypergradient.engines import candidates, reference
from hydragrad.hypergradient.output_jacobian import OutputJacobian
from hydragrad.hypergradient.scaled import Direct, PerExampleGradients, ScaledEngine
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tracing import Traced
from hydragrad.step.objective import Point, Vectors

_SHARE, _FIRST_SHARE = 0.15, 0.5
"""Part of the predicted time that measuring may take; of the reference's, which the first engine halves at least."""
_BLOCKS = (1, 4, 8, 16, 32, 64, 128)
_START, _WIDEST, _COMPILED_BLOCK, _WIDER = 16, 512, 64, 4
_TRACED, _TRACING_GAIN = 100, 0.3
"""Products of one form from which on tracing them pays; what it saves of a plain product's time at least, where each is
long: measured 0.35 to 0.75."""
_FEW = 4
"""Queries below which forming per-example gradients or Jacobians costs more than it saves."""
_BEYOND_CACHE = 64 * 2**20
"""Bytes of blocks that measurements go through in turn."""
_WORSE = 1.1
"""A block that takes this much longer per query than the best ends the search in its direction."""
_NEAR, _EQUAL = 1.25, 1.03
"""Per query against the best: within this, a block is timed once more; within that, it is as good."""
_TRACING_SECONDS, _COMPILE_SECONDS = 0.1, 40.0
"""What tracing and torch.compile are expected to cost; compiled where half of the predicted time is more than that."""


@final
class Search:
    """Looks for the engine of a method that takes least per query at a point.

    ``memo``: measurements and graphs that earlier searches on the same run left; they are not made again.
    ``reasons``: which engines were refused, and why.
    """

    def __init__(self, sweep: Sweep, point: Point, method: str, memo: dict[Any, Any]) -> None:
        self.objective, self.point, self.method = sweep.objective, point, method
        self.device, self.steps = sweep.replayer.device, sweep.stop
        self.elementwise, self.tokens = sweep.elementwise, sweep.tokens
        # graphs hold for their objective: an earlier step= may have had other parameters or buffers
        objective = (self.objective.names, self.objective.carried, self.objective.counters)
        self.graphs: dict[Any, Any] = sweep.run.memo.setdefault(("graphs", *objective), {})
        self.seconds: dict[tuple[str, int], float] = memo.setdefault("seconds", {})
        self.settled: set[Any] = memo.setdefault("settled", set())
        self.refused: dict[str, str] = memo.setdefault("refused", {})
        # what trying costs and what it took so far: or every later call would try a little more
        self.spent: dict[str, float] = memo.setdefault("spent", {"preparing": _TRACING_SECONDS, "before": 0.0})

    @property
    def reasons(self) -> list[str]:
        return list(self.refused.values())

    def best(self, queries: int, widest: int, held: int, *, fixed: int | None, compile: bool | None) -> Timed:
        """The fastest found; blocks of at most ``widest`` (or ``fixed``), engines that hold at most ``held`` bytes."""
        self.total, self.queries, self.held = queries, min(queries, widest), held
        self.fixed = min(fixed, queries) if fixed else None
        self.began = time.perf_counter()
        first = self.fixed or self._balanced(_START)
        self.found = self._reference(first)
        share = _FIRST_SHARE
        for engine, block in self._ranked(first):
            if self._known(engine, block) or self._pays(self._cost(engine, block), share):
                self._try(engine, block)
                share = _SHARE
        self._climb(first)
        self._compiled(compile)
        self.spent["before"] += time.perf_counter() - self.began
        return self.found

    def _ranked(self, first: int) -> Iterator[tuple[Engine | ScaledEngine, int]]:
        """Engines worth measuring, most promising first, each with the block to begin with."""
        wide = self.fixed or self._balanced(_WIDEST)
        coupled = self.point.carried or self.point.draws
        if self.queries >= _FEW and not coupled:
            if self.method == "hessian-free" and self.elementwise and not self.tokens:
                yield self._kept("per-example", lambda: PerExampleGradients(self.objective)), wide
            if self.method == "gauss-newton" and self.objective.problem.penalty is None:
                jacobian = self._kept("output-jacobian", lambda: OutputJacobian(self.objective))
                if jacobian.explicit and jacobian.held(self.point) <= self.held:
                    yield jacobian, self.fixed or self._balanced(_BLOCKS[-1])
        plain = self.seconds[repr(reference(self.method, self.objective)), 1]
        count = self.steps * -(-self.total // first)
        often = count >= _TRACED or _TRACING_GAIN * plain * count >= _TRACING_SECONDS
        for engine in candidates(self.method, self.objective):
            key = ("traced", repr(engine))
            if (often or key in self.graphs) and repr(Traced(engine)) not in self.refused:
                yield self._scaled(self._kept(key, lambda e=engine: Traced(e))), first
            if not often or repr(Traced(engine)) in self.refused:
                yield self._scaled(engine), first

    def _scaled(self, engine: Engine) -> Engine | ScaledEngine:
        """Hessian-free engines serve through the sweep of one direction, where that holds."""
        return Direct(engine) if self.method == "hessian-free" and self.elementwise else engine

    def _reference(self, width: int) -> Timed:
        """Plain autograd, and what it gives for one vector: the truth that others are compared with."""
        base = reference(self.method, self.objective)
        self.truth = None
        key = (repr(base), 1)
        if key not in self.seconds:
            one = probe_block(self.point, 1)
            self.truth = self._differentiated(base, one)
            began = time.perf_counter()
            products(base, self.point, one)
            self.seconds[key] = time.perf_counter() - began  # once: it is only the measure for what may be tried
        return Timed(self._scaled(base), width, self.seconds[key] * width)

    def _differentiated(self, base: Engine, one: Vectors) -> Products:
        """What plain autograd gives; refused where torch has no derivative for an operation of the model or loss."""
        try:
            return products(base, self.point, one)
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, NotImplementedError) as error:
            raise UnsupportedError(
                message(
                    f"torch cannot differentiate this model or loss as method={self.method!r} needs it",
                    expected="operations that autograd can differentiate twice",
                    got=_first_line(error),
                    cause="a fused kernel or a custom autograd function without a second derivative",
                    remedy="write that operation in others (torch names it), and record again",
                )
            ) from error

    def _climb(self, first: int) -> None:
        """Larger blocks of the best engine; if none is better, smaller ones."""
        if self.fixed or not getattr(_inner(self.found.engine), "batched", True) or self.found.block > first:
            return
        engine = self.found.engine
        sizes = sorted({self._balanced(size) for size in _BLOCKS if size <= self.queries})
        for way in ([s for s in sizes if s > first], [s for s in reversed(sizes) if s < first]):
            worse = 0  # twice in a row: one alone may be another program's doing
            for size in way:
                if not self._known(engine, size) and not self._pays(self._cost(engine, size)):
                    break
                timed = self._try(engine, size)
                worse = worse + 1 if timed is None or timed.per_query > _WORSE * self.found.per_query else 0
                if worse == 2:
                    break
            if self.found.block > first:
                break
        self._settle(engine, sizes)

    def _settle(self, engine: Engine | ScaledEngine, sizes: list[int]) -> None:
        """Time the sizes within noise of the best once more, in turns; of equals the larger, which repeats less."""
        name, best = repr(engine), self.found.per_query
        near = [k for k in sizes if self.seconds.get((name, k), float("inf")) / k <= _NEAR * best]
        near = sorted(near, key=lambda k: self.seconds[name, k] / k)[:3]
        key = ("settled", name, *near)
        if len(near) > 1 and key not in self.settled and self._pays(4 * sum(near) * best):
            self.settled.add(key)
            for k in near:
                again = self._block_seconds(engine, probe_block(self.point, k))
                self.seconds[name, k] = min(again, self.seconds[name, k])
        if near:
            least = min(self.seconds[name, k] / k for k in near)
            size = max(k for k in near if self.seconds[name, k] / k <= _EQUAL * least)
            self.found = Timed(engine, size, self.seconds[name, size])

    def _compiled(self, compile: bool | None) -> None:
        """The engine that gains most from fusion, compiled at one size: a compiled graph holds for its block."""
        if compile is False or self.method == "hessian-free":
            return
        engine = candidates(self.method, self.objective)[-1]
        block = self.fixed or self._balanced(min(_COMPILED_BLOCK, _WIDER * self.found.block))
        made = [key[2] for key in self.graphs if key[:2] == ("compiled", repr(engine)) and key[2] <= self.queries]
        block = block if self.fixed or not made else made[0]  # compiling once more costs more than another size gains
        key = ("compiled", repr(engine), block)
        half = 0.5 * self.steps * self.total * self.found.per_query
        plain_fails = repr(engine) in self.refused
        if not plain_fails and (compile or half > _COMPILE_SECONDS or key in self.graphs):
            self._try(self._kept(key, lambda: Traced(engine, compile=True)), block, forced=bool(compile))

    def _balanced(self, size: int) -> int:
        """The size at most this large that cuts the queries into equal blocks."""
        return -(-self.queries // -(-self.queries // min(size, self.queries)))

    def _known(self, engine: Engine | ScaledEngine, size: int) -> bool:
        return (repr(engine), size) in self.seconds or repr(engine) in self.refused

    def _cost(self, engine: Engine | ScaledEngine, size: int) -> float:
        """Expected seconds of trying: to prepare its graph, and four products."""
        prepared = isinstance(_inner(engine), Engine) and not isinstance(_inner(engine), (Traced, OutputJacobian))
        return (0.0 if prepared else self.spent["preparing"]) + 4 * size * self.found.per_query

    def _pays(self, seconds: float, share: float | None = None) -> bool:
        """Whether another ``seconds`` of measuring are small against what is still to be done."""
        share = _SHARE if share is None else share
        spent = self.spent["before"] + time.perf_counter() - self.began
        return spent + seconds < share * self.steps * self.total * self.found.per_query

    def _kept(self, key: Any, make: Callable[[], Any]) -> Any:
        """An object whose graphs serve later calls on the same run."""
        if key not in self.graphs:
            self.graphs[key] = make()
        return self.graphs[key]

    def _try(self, engine: Engine | ScaledEngine, size: int, *, forced: bool = False) -> Timed | None:
        """Compare an engine with the reference, time it at a size (unless known), keep it if it is the best."""
        name = repr(engine)
        if name in self.refused:
            return None
        if (name, size) not in self.seconds:
            try:
                self._measure(engine, size)
            except (RuntimeError, NotImplementedError, TypeError, ValueError, UnsupportedError) as error:
                self.refused[name] = f"{name} cannot differentiate this model ({_first_line(error)})"
                return None
        if name in self.refused:
            return None
        timed = Timed(engine, size, self.seconds[name, size])
        if forced or timed.per_query < self.found.per_query:
            self.found = timed
        return timed

    def _measure(self, engine: Engine | ScaledEngine, size: int) -> None:
        name, gam = repr(engine), probe_block(self.point, size)
        began, inner = time.perf_counter(), _inner(engine)
        if isinstance(inner, Traced):
            inner.prepare(self.point, gam, probe_buffers(self.point, size))
        found = products(engine, self.point, gam)
        prepared = time.perf_counter() - began
        if self.truth is None:
            self.truth = products(reference(self.method, self.objective), self.point, probe_block(self.point, 1))
        rows = None if found[0] is None else tuple(x[:1] for x in found[0])
        if not agree((rows, found[1][:1], tuple(x[:1] for x in found[2])), self.truth):
            self.refused[name] = f"{name} disagrees with plain autograd here and is not used"
            return
        self.seconds[name, size] = self._block_seconds(engine, gam)
        self.spent["preparing"] = min(max(prepared - self.seconds[name, size], 0.01), 10.0)

    def _block_seconds(self, engine: Engine | ScaledEngine, gam: Vectors) -> float:
        """Seconds of one block, with its share of what the engine computes once a point for all of a step's blocks."""
        each = quick_seconds(self._as_in_a_sweep(engine, gam, itertools.repeat(self.point)), self.device)
        if not engine.held(self.point):
            return each
        fresh = (replace(self.point) for _ in itertools.count())
        first = quick_seconds(self._as_in_a_sweep(engine, gam, fresh), self.device)
        return each + max(first - each, 0.0) / -(-self.queries // len(gam[0]))

    def _as_in_a_sweep(
        self, engine: Engine | ScaledEngine, gam: Vectors, points: Iterator[Point]
    ) -> Callable[[], None]:
        """A product of the next of several blocks, added to it: in a sweep a block comes from outside the cache too."""
        size, each = len(gam[0]), sum(g.nbytes for g in gam)
        count = max(1, min(-(-self.queries // size), _BEYOND_CACHE // each))
        copies = itertools.cycle([tuple(g.clone() for g in gam) for _ in range(count)])

        def work() -> None:
            block = next(copies)
            curved = products(engine, next(points), block)[0]
            for x, c in zip(block, curved or (), strict=False):
                x.add_(c, alpha=0.0)

        return work


def _inner(engine: Engine | ScaledEngine) -> Engine | ScaledEngine:
    return engine.engine if isinstance(engine, Direct) else engine


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:100]
