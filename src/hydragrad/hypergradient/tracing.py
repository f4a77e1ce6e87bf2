"""A computation recorded once as a flat graph of tensor operations, then run without Python's overhead."""

from collections.abc import Callable
from dataclasses import fields, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree

from hydragrad.hypergradient.agreement import close
from hydragrad.hypergradient.curvature import Engine, Products
from hydragrad.hypergradient.factors import factored, whole
from hydragrad.hypergradient.hoisting import Halves, halved
from hydragrad.hypergradient.linear import combined, dependent
from hydragrad.hypergradient.lowering import lowered
from hydragrad.hypergradient.simplify import changes_in_place, draws_numbers, simplified
from hydragrad.step.forms import form_of
from hydragrad.step.objective import Point, Vectors

_MOST_GRAPHS = 16
"""Shapes traced per function; beyond these (ragged batches) it runs untraced."""
_PARTS = 8
_RARE = 100
"""The first form is traced at once, others when seen this often: tracing takes as long as a hundred plain calls.

So an epoch's last batch is traced where many blocks of queries meet it, not where one query does."""


@final
class TracedFunction:
    """A pure function of pytrees, run through graphs traced by ``make_fx``, one for every combination of shapes.

    Function transforms (vmap of jvp of grad) cost tens of microseconds an operation in Python; the traced graph has
    the same operations without them, and what they compute twice is computed once. A graph holds for one form of
    input only, and values that Python reads out of tensors would be frozen into it: tracing refuses those, and whoever
    chooses an engine compares it with plain autograd. ``compile``: hand the graph to torch.compile, which fuses it.
    ``settled``: trace the first form alone, so that no result's rounding depends on what was called before.
    ``linear``: how many of the last inputs the function is linear in, all together (an engine's block of vectors; 0:
    none). What does not depend on these is then computed once for all calls that come with the same object ``at``.
    ``outer``: results that are outer products come as their ``Factors`` where a graph computes them.
    ``plain``: computes the same where no graph does, and what a graph is compared with (None: ``function``).
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        compile: bool = False,
        linear: int = 0,
        outer: bool = False,
        plain: Callable[..., Any] | None = None,
    ) -> None:
        self.function, self.plain = function, plain or function
        self.compile, self.settled, self.linear, self.outer = compile, False, linear, outer
        self._seen: dict[Any, int] = {}
        self._untraceable: set[Any] = set()
        self._graphs: dict[Any, tuple[Callable[..., Any] | Halves, Any]] = {}
        self._kept: tuple[Any, Any, tuple[Any, ...]] = (None, None, ())

    @property
    def held(self) -> int:
        """Bytes that stay from one call to the next."""
        return max((graph.held for graph, _ in self._graphs.values() if isinstance(graph, Halves)), default=0)

    def __call__(self, *inputs: Any, at: object = None) -> Any:
        tensors: list[Tensor] = []
        key = form_of(inputs, tensors)
        if key not in self._graphs:
            self._seen[key] = self._seen.get(key, 0) + 1
            rare = self._graphs and (self.settled or self._seen[key] < _RARE)
            if rare or not self._learn(key, inputs, tensors):
                return self.plain(*inputs)
        graph, form = self._graphs[key]
        with torch.no_grad():
            if not isinstance(graph, Halves):
                return pytree.tree_unflatten(graph(*tensors), form)
            if at is None or self._kept[0] is not at or self._kept[1] is not graph:
                self._kept = (None, None, ())  # the last step's make room first: beside them the heap would be torn
                self._kept = (at, graph, graph.constants(tensors))
            return pytree.tree_unflatten(graph(self._kept[2], tensors), form)

    def prepare(self, *inputs: Any) -> None:
        """Trace this form now, however rare it is: it is about to be measured, or known to come often."""
        tensors: list[Tensor] = []
        key = form_of(inputs, tensors)
        if key not in self._graphs:
            self._learn(key, inputs, tensors)

    def _learn(self, key: Any, inputs: tuple[Any, ...], tensors: list[Tensor]) -> bool:
        """Trace a form; False if it is to run untraced. Raises RuntimeError if the first one cannot be traced."""
        if len(self._graphs) >= _MOST_GRAPHS or key in self._untraceable:
            return False
        try:
            made = self._trace(inputs)
        except RuntimeError:
            if not self._graphs:
                raise
            made = None
        # only the first graph is compared by whoever chooses the engine
        if made is None or (self._graphs and not self._agrees(made, tensors, self.plain(*inputs))):
            self._untraceable.add(key)  # what this form does in Python stays there: other modes, other layers
            return False
        self._graphs[key] = made
        return True

    @staticmethod
    def _agrees(made: tuple[Callable[..., Any] | Halves, Any], tensors: list[Tensor], plain: Any) -> bool:
        graph = made[0]
        try:
            with torch.no_grad():
                found = graph(graph.constants(tensors), tensors) if isinstance(graph, Halves) else graph(*tensors)
        except RuntimeError:
            return False
        leaves = pytree.tree_leaves(plain)
        return all(close(whole(x), y) if isinstance(y, Tensor) else x == y for x, y in zip(found, leaves, strict=True))

    def _trace(self, inputs: tuple[Any, ...]) -> tuple[Callable[..., Any] | Halves, Any]:
        leaves, structure = pytree.tree_flatten(inputs)
        forms: list[Any] = []

        def flat(*tensors: Tensor) -> list[Any]:
            given = iter(tensors)
            filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
            out, form = pytree.tree_flatten(self.function(*pytree.tree_unflatten(filled, structure)))
            forms.append(form)
            return out

        graph = simplified(_functional_graph(flat, [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]))
        graph = factored(graph) if self.outer and not changes_in_place(graph) else graph
        compiled = self.compile and not self._graphs  # only the usual form: compiling takes tens of seconds
        block = self._block(graph, inputs)
        if not block or changes_in_place(graph) or draws_numbers(graph):
            return torch.compile(graph, dynamic=False) if compiled else lowered(graph).forward, forms[-1]
        graph = graph if compiled else combined(graph, block)  # compiling fuses what the graph says one by one
        halves = halved(graph, dependent(graph.graph, block))
        made = torch.compile(halves.block, dynamic=False) if compiled else lowered(halves.block).forward
        # forward: what a module's call adds to it is a tenth of a small step
        return replace(halves, point=lowered(halves.point).forward, block=made), forms[-1]

    def _block(self, graph: GraphModule, inputs: tuple[Any, ...]) -> list[Node]:
        """The placeholders that belong to the inputs that the function is linear in."""
        count = sum(isinstance(x, Tensor) for x in pytree.tree_leaves(inputs[len(inputs) - self.linear :]))
        return [node for node in graph.graph.nodes if node.op == "placeholder"][-count:] if count else []


@final
class Traced(Engine):
    """An engine whose products run through a ``TracedFunction``."""

    name = "traced"
    method = "any"

    def __init__(self, engine: Engine, *, compile: bool = False) -> None:
        super().__init__(engine.objective)
        self.engine = engine
        self.method = engine.method  # type: ignore[misc]  # the forward sweep asks which curvature this is
        self.function = TracedFunction(self._products, compile=compile, linear=2, plain=self._in_parts)

    def products(self, point: Point, gam: Vectors, bet: Vectors = ()) -> Products:
        return self.function(self.objective.mode, _parts(point), gam, bet, at=point)

    def prepare(self, point: Point, gam: Vectors, bet: Vectors = ()) -> None:
        """Trace products of this form now: see ``TracedFunction.prepare``."""
        self.function.prepare(self.objective.mode, _parts(point), gam, bet)

    def held(self, point: Point) -> int:
        """What does not depend on the block, once a graph was made."""
        return self.function.held + self.engine.held(point)

    def _products(self, mode: int, given: tuple[Any, ...], gam: Vectors, bet: Vectors) -> Products:
        return self.engine.products(Point(*given), gam, bet)

    def _in_parts(self, mode: int, given: tuple[Any, ...], gam: Vectors, bet: Vectors) -> Products:
        """A part of the block after the other: untraced, all at once takes several times the memory that is planned."""
        parts = zip(*(x.split(max(2, -(-len(x) // _PARTS))) for x in (*gam, *bet)), strict=True)
        found = [self._products(mode, given, part[: len(gam)], part[len(gam) :]) for part in parts]
        if len(found) == 1:
            return found[0]
        curved, terms, back = zip(*found, strict=True)
        whole = tuple(torch.cat(same) for same in zip(*back, strict=True))
        return None if curved[0] is None else tuple(map(torch.cat, zip(*curved, strict=True))), torch.cat(terms), whole

    def __repr__(self) -> str:
        return f"<{self.engine.method} engine {self.engine.name}, {'compiled' if self.function.compile else 'traced'}>"


def _parts(point: Point) -> tuple[Any, ...]:
    return tuple(getattr(point, field.name) for field in fields(Point))


def _functional_graph(flat: Callable[..., list[Any]], tensors: list[Tensor]) -> GraphModule:
    """The traced graph; changes in place that it holds are rewritten where torch can.

    It is the finished graph that is made functional, not the function: modes that are active while that runs (random
    numbers handed out) do not bear the transform.
    """
    graph = _recorded(flat, tensors)
    if not changes_in_place(graph):
        return graph
    try:
        return _recorded(torch.func.functionalize(graph), tensors)
    except (RuntimeError, NotImplementedError):
        return graph


def _recorded(function: Callable[..., Any], tensors: list[Tensor]) -> GraphModule:
    """By ``make_fx`` on tensors without values: with them, all intermediate results of a block would live at once."""
    return make_fx(function, tracing_mode="fake", _allow_non_fake_inputs=True)(*tensors)
