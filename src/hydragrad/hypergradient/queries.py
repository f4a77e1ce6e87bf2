"""The queries: what is measured of a trained model, and its sensitivity to the parameters."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader

from hydragrad.copying import copy_of
from hydragrad.errors import HydragradError, MismatchError, NonFiniteError, message
from hydragrad.files import sha256
from hydragrad.hypergradient.company import check_company
from hydragrad.hypergradient.curvature import over_block, vjp
from hydragrad.problem import Problem
from hydragrad.step.objective import Objective, Vectors
from hydragrad.trajectory.batches import BatchSource
from hydragrad.trajectory.digests import batch_digests
from hydragrad.trajectory.randomness import undisturbed
from hydragrad.trajectory.state import State

_TOGETHER = 8
"""Queries differentiated together: the cost of their gradients grows with the square of this."""


@final
@dataclass(frozen=True)
class Columns:
    """Which column each query counts in, and with what factor: one each, or aggregated.

    ``of`` int64 [number of queries]; ``factor`` [number of queries]; ``count`` M.
    """

    of: Tensor
    factor: Tensor
    count: int

    @staticmethod
    def make(aggregate: "str | Tensor | Sequence[Any] | None", queries: int) -> "Columns":
        """From ``aggregate``: None (a column a query), "mean", "sum", or a group number per query (sums)."""
        if queries == 0:
            raise MismatchError(message("no queries", expected="at least one query", got="an empty data set"))
        if aggregate is None:
            return Columns(torch.arange(queries), torch.ones(queries), queries)
        if isinstance(aggregate, str) and aggregate in ("mean", "sum"):
            factor = 1.0 / queries if aggregate == "mean" else 1.0
            return Columns(torch.zeros(queries, dtype=torch.int64), torch.full((queries,), factor), 1)
        if isinstance(aggregate, str):
            raise MismatchError(
                message(
                    "unknown aggregate",
                    expected="'mean' or 'sum', or a group number for every query",
                    got=repr(aggregate),
                    remedy="combine queries otherwise with a measurement of your own",
                )
            )
        return Columns(*group_numbers(aggregate, queries, "aggregate", "query"))

    def of_block(self, columns: slice) -> Tensor:
        """The queries that count in these columns, in order."""
        return ((self.of >= columns.start) & (self.of < columns.stop)).nonzero().flatten()

    def collect(self, values: Tensor) -> Tensor:
        """Measured values of all queries as those of the columns, float64 [M]."""
        factors = self.factor.double()
        return torch.zeros(self.count, dtype=torch.float64).index_add_(0, self.of, values.double().cpu() * factors)


def group_numbers(groups: Any, length: int, argument: str, what: str) -> tuple[Tensor, Tensor, int]:
    """A group number per element, refused unless integers >= 0, one for each; with factors of one and the count."""
    numbers = _as_numbers(groups)
    if (
        numbers is None
        or numbers.shape != (length,)
        or numbers.is_floating_point()
        or numbers.is_complex()
        or int(numbers.min()) < 0
    ):
        raise MismatchError(
            message(
                f"{argument} does not number every {what}",
                expected=f"{length} integers, 0 or larger (or, for queries, 'mean' or 'sum')",
                got=f"{argument} = {repr(groups)[:80]}"
                if numbers is None
                else f"{argument} of shape {list(numbers.shape)} and dtype {numbers.dtype}",
                remedy=f"give the group of every {what}, in the order of the data set"
                + ("; number names: [sorted(set(names)).index(name) for name in names]" if numbers is None else ""),
            )
        )
    numbers = numbers.to("cpu", torch.int64)
    return numbers, torch.ones(length), int(numbers.max()) + 1


def _as_numbers(given: Any) -> Tensor | None:
    """A tensor; None for what holds anything else than numbers (names), or rows of different lengths."""
    try:
        return torch.as_tensor(given)
    except (TypeError, ValueError, RuntimeError):
        return None


def example_ids(given: Any, count: int, argument: str) -> Tensor:
    """Positions of training examples, int64 [n], refused unless integers from 0 to ``count`` - 1.

    Or a mask, bool [``count``], that is true somewhere.
    """
    ids = _as_numbers(given)
    mask = None if ids is None or ids.dtype != torch.bool else ids
    if mask is not None and mask.shape == (count,):
        ids = mask.nonzero().flatten()
    if ids is not None and _are_positions(ids, count):
        return ids.to("cpu", torch.int64)
    if mask is not None:
        got = f"a mask of shape {list(mask.shape)}, {int(mask.sum())} of it true"
    elif ids is not None and ids.numel() <= 8:
        got = ids.tolist()
    else:
        got = repr(given)[:80] if ids is None else f"{ids.flatten()[:8].tolist()} and more"
    raise MismatchError(
        message(
            f"{argument} does not name training examples",
            expected=f"integers from 0 to {count - 1}, or a mask of shape [{count}] that is true somewhere",
            got=got,
            remedy="name examples by their positions in the training data",
        )
    )


def _are_positions(ids: Tensor, count: int) -> bool:
    if ids.dim() != 1 or not len(ids) or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        return False
    return 0 <= int(ids.min()) <= int(ids.max()) < count


@final
class Queries:
    """m_j(w, v): the measurement of every query with given parameters, in evaluation mode.

    By default the problem's loss (a token loss summed over L); ``measurement(model, batch) -> [m]`` replaces it.
    """

    def __init__(
        self,
        problem: Problem,
        data: Any,
        names: tuple[str, ...],
        measurement: Callable[[nn.Module, Any], Tensor] | None,
        device: torch.device,
        mode: str,
        carried: tuple[str, ...] = (),
    ) -> None:
        self.count = length_of(data)
        self.device = device
        self._objective = Objective(
            replace(problem, loss=measurement or problem.loss), _evaluation(problem.model), names, carried
        )
        self._source = BatchSource(data, problem.collate, device, mode)
        self._steady = False
        self._double = False
        self._together = 1 if mode == "index" else _TOGETHER
        self._alone = False

    def doubled(self) -> "Queries":
        """The same in float64: model, states and queries. What the measurement itself brings along stays as it is."""
        other, own = copy.copy(self), self._objective
        other._objective = Objective(own.problem, copy_of(own.module).double(), own.names, own.carried)
        other._double = True
        return other

    def functions(self, state: State, ids: Tensor) -> Iterator[tuple[Callable[[Vectors], Tensor], Vectors]]:
        """For a few of these queries at a time: m [n] as a function of parameters and buffers, and those of the state.

        To be called while the iteration is at them: within, torch uses the kernels that have derivatives.
        """
        for part, measure, at in self._batches(state, ids):
            with self._objective.differentiable(), _measuring(part):
                yield measure, at

    def values(self, state: State) -> Tensor:
        """M [M] at a state."""
        return self._values(state, torch.arange(self.count))

    def _values(self, state: State, ids: Tensor) -> Tensor:
        with torch.enable_grad():  # of nothing, but for a loss that takes gradients by itself
            values = []
            for part, measure, at in self._batches(state, ids):
                with _measuring(part):
                    values.append(measure(at).detach())
        return torch.cat(values)

    def _check_company(self, state: State, ids: Tensor) -> None:
        """``check_company`` once, on the first queries that are measured together."""
        part = ids[: self._together]
        if len(part) > 1 and not self._alone:
            self._alone = True
            with self._objective.differentiable(), undisturbed():
                check_company(lambda ids: self._values(state, ids), part, self.device)

    def digest(self) -> str:
        """Tells these queries from others by their content, in order."""
        parts = torch.arange(self.count).split(self._together)
        return sha256(torch.cat([batch_digests(self._source.fetch(p), len(p)).cpu() for p in parts]).numpy().tobytes())

    def sensitivities(self, state: State, columns: Columns, chosen: slice) -> tuple[Vectors, Vectors]:
        """D m/dw and d m/dv of the chosen columns: a block ``[number of columns, *shape]`` a parameter, a buffer."""
        width = chosen.stop - chosen.start
        total: list[Tensor] | None = None
        self._check_company(state, columns.of_block(chosen))
        for ids, measure, at in self._batches(state, columns.of_block(chosen)):
            local, rows = columns.of[ids].unique(return_inverse=True)
            cotangents = torch.zeros(len(local), len(ids), dtype=at[0].dtype)
            cotangents[rows, torch.arange(len(ids))] = columns.factor[ids].to(at[0].dtype)
            with self._objective.differentiable(), _measuring(ids):
                gradients = pulled_back(measure, at, cotangents.to(self.device))
            if total is None:
                total = [torch.zeros(width, *x.shape, dtype=x.dtype, device=x.device) for x in at]
            for sums, rows_of in zip(total, gradients, strict=True):
                sums.index_add_(0, (local - chosen.start).to(self.device), rows_of)
        assert total is not None
        if not all(bool(x.isfinite().all()) for x in total):
            raise NonFiniteError(
                message(
                    "the derivative of a query is not finite",
                    expected="finite derivatives of the measurement with respect to parameters and buffers",
                    got="NaN or infinity",
                    cause="a diverged run, or a measurement with an infinite slope (sqrt or log at 0)",
                    remedy="look at the final loss of the run, and at the measurement's value for each query",
                )
            )
        count = len(self._objective.names)
        return tuple(total[:count]), tuple(total[count:])

    def _batches(self, state: State, ids: Tensor) -> Iterator[tuple[Tensor, Callable[[Vectors], Tensor], Vectors]]:
        """Ids, the measurement as a function of parameters and carried buffers in one tuple, and that tuple."""
        names, carried = self._objective.names, self._objective.carried
        at = tuple(state.params[name] for name in names) + tuple(state.buffers[name] for name in carried)
        known, count = {*names, *carried}, len(names)
        rest = {name: x for name, x in {**state.params, **state.buffers}.items() if name not in known}
        if self._double:
            at, rest = in_double(at), in_double(rest)
        for part in ids.split(self._together):
            with _measuring(part):
                batch = in_double(self._fetched(part)) if self._double else self._fetched(part)

            def measure(at: Vectors, batch: Any = batch, part: Tensor = part) -> Tensor:
                return _checked(self._objective.losses(at[:count], rest, batch, at[count:]), len(part))

            yield part, measure, at

    def _fetched(self, ids: Tensor) -> Any:
        """A batch of queries; the first one is asked for twice, and must come out the same."""
        batch = self._source.fetch(ids)
        if not self._steady:
            first, again = (batch_digests(one, len(ids)) for one in (batch, self._source.fetch(ids, fresh=True)))
            if not torch.equal(first, again):
                raise MismatchError(
                    message(
                        "the queries have other content each time they are asked for",
                        expected="the same batch of the same queries",
                        cause="random numbers in collate_fn (mixup), or random augmentation of the queries",
                        remedy="give queries without augmentation, and to hydragrad.load a collate_fn that draws no "
                        "random numbers (of a run recorded with keep_batches=True it collates the queries alone)",
                    )
                )
            self._steady = True
        return batch


def in_double(values: Any) -> Any:
    """Float tensors in a batch, or anything nested, as float64."""
    return pytree.tree_map(lambda x: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x, values)


def pulled_back(function: Callable[[Vectors], Tensor], params: Vectors, cotangents: Tensor) -> Vectors:
    """Cotangents ``[n, b]`` times the Jacobian of ``function`` at ``params``: tuple of ``[n, *shape]``.

    Batched by vmap; row by row where an operation cannot be batched.
    """
    try:
        _, pull = vjp(function, params)
        return tuple(x.detach() for x in over_block(lambda row: pull(row)[0], cotangents))
    except (RuntimeError, NotImplementedError):
        with torch.enable_grad():
            leaves = tuple(p.detach().requires_grad_() for p in params)
            out = function(leaves)
            rows = [
                torch.autograd.grad(out, leaves, row, retain_graph=True, materialize_grads=True) for row in cotangents
            ]
        return tuple(torch.stack(parts) for parts in zip(*rows, strict=True))


@contextmanager
def _measuring(ids: Tensor) -> Iterator[None]:
    """Turn an error of the user's code on these queries into a MismatchError that names them."""
    try:
        yield
    except (HydragradError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        raise MismatchError(
            message(
                f"queries {int(ids[0])} to {int(ids[-1])} cannot be measured",
                expected="samples as the training data has them: input of the same shape, label",
                got=f"{type(error).__name__}: {str(error)[:300]}",
                cause="queries of another shape or kind, or a loss (or measurement=) that does not take them",
                remedy="call loss(model, batch) on a batch of the queries by hand",
            )
        ) from error


def _evaluation(model: nn.Module) -> nn.Module:
    return copy_of(model).eval()


def length_of(data: Any) -> int:
    """How many queries there are; refused for what is no data set: a loader, an iterator."""
    if isinstance(data, DataLoader) or not hasattr(data, "__len__"):
        raise MismatchError(
            message(
                "the queries are no data set",
                expected="a data set or list of samples: __len__ and __getitem__",
                got=type(data).__name__,
                remedy="give the data set (loader.dataset), not the loader or an iterator",
            )
        )
    return len(data)


def _checked(measured: Tensor, queries: int) -> Tensor:
    if not isinstance(measured, Tensor) or measured.dim() == 0 or measured.shape[0] != queries:
        raise MismatchError(
            message(
                "the measurement does not give a number per query",
                expected=f"a tensor of shape [{queries}] (or [{queries}, L], which is summed over L)",
                got=f"shape {list(measured.shape)}" if isinstance(measured, Tensor) else type(measured).__name__,
                remedy="measure each query by itself; combine queries with aggregate=",
            )
        )
    return measured.flatten(1).sum(1) if measured.dim() > 1 else measured
