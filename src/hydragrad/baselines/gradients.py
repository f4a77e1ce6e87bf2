"""Gradients of single examples as flat rows, a chunk at a time: what every baseline is made of."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn

from hydragrad.asked import Asked
from hydragrad.attribution import Attribution
from hydragrad.copying import copy_of
from hydragrad.diagnostics import Diagnostics
from hydragrad.errors import MismatchError, NonFiniteError, message
from hydragrad.hypergradient.agreement import AGREEMENT
from hydragrad.hypergradient.queries import Columns, Queries
from hydragrad.hypergradient.scaled import PerExampleGradients
from hydragrad.run import Run
from hydragrad.shapes import in_rows
from hydragrad.step.objective import Objective, Point, Vectors
from hydragrad.trajectory.batches import BatchSource
from hydragrad.trajectory.ending import refuse_moved_on
from hydragrad.trajectory.identity import identity
from hydragrad.trajectory.state import State

MEMORY = 2**29
"""Bytes that flat gradients may take, unless told."""
_MOST_ROWS = 512
"""Examples differentiated together at most: more do not make it faster."""


@final
class Setting:
    """One run, the parameters that count, the queries; and the gradients of both at any recorded state.

    Everything in evaluation mode (BatchNorm by its running statistics, no dropout), so that examples do not depend on
    each other. The training objective is the mean over the training set,

        L(w) = (1/N) sum_i loss_i(w)

    whatever the batches' reduction was: a token loss counts as its mean for reduction "mean", as its sum for "sum".
    Gradients are rows [n, P] over ``names`` (those that training changed, or those of ``layer``), never [N, P] at once.
    """

    def __init__(
        self,
        run: Run,
        queries: Any = None,
        *,
        layer: str | None = None,
        measurement: Callable[[nn.Module, Any], Tensor] | None = None,
        memory: int = MEMORY,
    ) -> None:
        self.began = time.perf_counter()
        self.run = run
        self.names = _of_layer(run, trained_names(run), layer)
        self.device = next((p.device for p in run.problem.model.parameters()), torch.device("cpu"))
        self.objective = Objective(run.problem, copy_of(run.problem.model).eval(), self.names)
        mode = run.trajectory.manifest.collate["mode"]
        self._source = BatchSource(run.problem.data, run.problem.collate, self.device, mode)
        self._single = mode == "index"
        self._rows = PerExampleGradients(self.objective)
        self._trusted: bool | None = None
        specs = [run.trajectory.manifest.params[name] for name in self.names]
        self.dtype: torch.dtype = getattr(torch, specs[0]["dtype"])
        self.size = sum(int(torch.tensor(spec["shape"]).prod()) for spec in specs)
        self.room = max(1, memory // (2 * self.size * self.dtype.itemsize))
        """Rows [P] that fit into half of the memory."""
        self.columns: Columns | None = None
        if queries is not None:
            self.asked = Queries(run.problem, queries, self.names, measurement, self.device, mode)
            self.columns = Columns.make(None, self.asked.count)
            self.measurement = measurement

    def end(self) -> State:
        """The trained model: the state after the last recorded step."""
        refuse_moved_on(self.run.trajectory)
        return self.placed(next(self.run.states(self.run.num_steps, self.run.num_steps + 1)))

    def placed(self, state: State) -> State:
        """The state on the model's device."""
        params, buffers = (
            {name: x.to(self.device) for name, x in part.items()} for part in (state.params, state.buffers)
        )
        return replace(state, params=params, buffers=buffers)

    def params(self, state: State) -> Vectors:
        """The parameters that count."""
        return tuple(state.params[name] for name in self.names)

    def point(self, state: State, ids: Tensor) -> Point:
        """Those training examples, with the coefficients of their losses in N L(w)."""
        params = self.params(state)
        rest = {name: x for name, x in state.params.items() if name not in self.names} | state.buffers
        batch = self._source.fetch(ids)
        empty = torch.empty(0, dtype=params[0].dtype, device=self.device)
        point = Point(params, rest, batch, empty, empty)
        with torch.no_grad():
            like = empty.new_empty(self.objective.loss_shape(point, len(ids)))
            reduction = self.run.problem.reduction
            scale = 1 if reduction.name == "sum" else len(ids)
            coefficients = (reduction.coefficients(batch, like) * scale).contiguous()
        return replace(point, coefficients=coefficients, weights=torch.ones_like(coefficients))

    def chunks(self, most: int = _MOST_ROWS) -> Iterator[Tensor]:
        """The ids of all training examples, in pieces."""
        together = 1 if self._single else max(1, min(most, self.room))
        yield from torch.arange(self.run.num_examples).split(together)

    def rows(self, state: State) -> Iterator[tuple[Tensor, Tensor]]:
        """``(ids [b], grad loss_i [b, P])`` of all training examples, chunk by chunk."""
        for ids in self.chunks():
            point = self.point(state, ids)
            with self.objective.differentiable():
                yield ids, self._checked(self._gradients(point, ids))

    def query_rows(self, state: State, most: int | None = None) -> Iterator[tuple[slice, Tensor]]:
        """``(columns, grad m_j [k, P])`` of all queries, block by block."""
        assert self.columns is not None
        together = min(self.room, most or self.room)
        for first in range(0, self.columns.count, together):
            chosen = slice(first, min(first + together, self.columns.count))
            yield chosen, flat(self.asked.sensitivities(state, self.columns, chosen)[0])

    def products(self, state: State, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """Products grad loss_i . change(grad m_j), [N, M] on the CPU; ``change`` maps [k, P] to [k, P]."""
        assert self.columns is not None
        values = torch.empty(self.run.num_examples, self.columns.count, dtype=self.dtype)
        for chosen, block in self.query_rows(state):
            block = block if change is None else change(block)
            for ids, rows in self.rows(state):
                values[ids, chosen] = (rows @ block.T).cpu()
        return values

    def answer(self, values: Tensor, method: str, plan: str, reasons: Sequence[str] = ()) -> Attribution:
        """The matrix as an Attribution: refused if not finite, its cost in replays of the run."""
        assert self.columns is not None
        refuse_non_finite(values, method)
        diagnostics = Diagnostics(
            method=method,
            seconds=time.perf_counter() - self.began,
            check_seconds=0.0,
            replay_seconds=replay_seconds(self.run),
            drift=0.0,
            growth=1.0,
            plan=plan,
            reasons=("a baseline: nothing was retrained to check it", *reasons),
        )
        rows, columns = torch.arange(self.run.num_examples), torch.arange(self.columns.count)
        measured = self.columns.collect(self.asked.values(self.end()))
        asked = Asked.of(measured, self.run.num_steps, measurement=self.measurement)
        return Attribution(values, rows, columns, method, diagnostics, run=identity(self.run.steps), asked=asked)

    def _gradients(self, point: Point, ids: Tensor) -> Tensor:
        if self._trusted is not False:
            at = (point.params, point.rest, point.batch, point.coefficients)
            try:
                found = flat(self._rows.gradients(self.objective.mode, *at)).detach()
            except (RuntimeError, NotImplementedError, ValueError):
                self._trusted = False  # an operation that vmap cannot batch
            else:
                if self._trusted is None:
                    self._trusted = self._adds_up(found, point)
                if self._trusted:
                    return found
        return torch.stack([self._one(point, place, i) for place, i in enumerate(ids.tolist())])

    def _adds_up(self, found: Tensor, point: Point) -> bool:
        """Whether vmap split the batch where its examples are: the rows must sum to the gradient of the batch."""
        total = _gradient(self.objective, point.params, point.rest, point.batch, point.coefficients)
        return float((found.sum(0) - total).norm()) <= AGREEMENT[self.dtype] * float(found.norm()) + 1e-30

    def _one(self, point: Point, place: int, i: int) -> Tensor:
        batch = self._source.fetch(torch.tensor([i]))
        return _gradient(self.objective, point.params, point.rest, batch, point.coefficients[place : place + 1])

    def _checked(self, rows: Tensor) -> Tensor:
        if not bool(rows.isfinite().all()):
            raise NonFiniteError(
                message(
                    "the gradient of a training example is not finite",
                    expected="finite numbers",
                    got="NaN or infinity",
                    cause="a diverged run, or a loss with an infinite slope",
                )
            )
        return rows


def flat(parts: Sequence[Tensor]) -> Tensor:
    """Blocks [k, *shape], one a parameter, as rows [k, P]."""
    return torch.cat([in_rows(part) for part in parts], dim=1)


def unflat(rows: Tensor, like: Vectors) -> Vectors:
    """Inverse of ``flat``."""
    pieces = rows.split([p.numel() for p in like], dim=1)
    return tuple(piece.reshape(len(rows), *p.shape) for piece, p in zip(pieces, like, strict=True))


def trained_names(run: Run) -> tuple[str, ...]:
    """Parameters that the optimizer held and that a gradient reached."""
    grouped = {name for names in run.trajectory.manifest.optimizer["groups"] for name in names}
    idle = frozenset.intersection(*(record.without_grad for record in run.steps)) if run.steps else frozenset[str]()
    names = tuple(name for name in run.trajectory.manifest.params if name in grouped and name not in idle)
    if not names:
        raise MismatchError(message("no parameter was trained", expected="at least one gradient in the run"))
    return names


def replay_seconds(run: Run, most: int = 8) -> float:
    """Seconds that one replay takes, from its first steps (the fastest, times the number of steps)."""
    replayer, took = run.replayer(check=False), []
    for record in run.steps[:most]:
        began = time.perf_counter()
        replayer.advance(record)
        took.append(time.perf_counter() - began)
    return min(took, default=0.0) * run.num_steps


def refuse_non_finite(values: Tensor, method: str) -> None:
    """Raise NonFiniteError for NaN and infinities."""
    if not bool(values.isfinite().all()):
        raise NonFiniteError(
            message(
                f"the scores of {method} are not finite",
                expected="finite numbers",
                got="NaN or infinity",
                cause="a solver that diverged, or a diverged run",
                remedy="raise damping (for lissa: scale), or choose another solver",
            )
        )


def _of_layer(run: Run, names: tuple[str, ...], layer: str | None) -> tuple[str, ...]:
    if not layer:  # the whole model; "" is its name in named_modules()
        return names
    chosen = tuple(name for name in names if name.startswith(f"{layer}."))
    if not chosen:
        raise MismatchError(
            message(
                f"layer {layer!r} has no trained parameter",
                expected=f"a module among {sorted({name.rpartition('.')[0] for name in names})}",
                got=layer,
                remedy="name a module as model.named_modules() does",
            )
        )
    return chosen


def _gradient(objective: Objective, params: Vectors, rest: dict[str, Tensor], batch: Any, coefficients: Tensor):
    with torch.enable_grad():
        leaves = tuple(p.detach().requires_grad_() for p in params)
        total = (coefficients * objective.losses(leaves, rest, batch)).sum()
        return torch.cat([g.flatten() for g in torch.autograd.grad(total, leaves, materialize_grads=True)])
