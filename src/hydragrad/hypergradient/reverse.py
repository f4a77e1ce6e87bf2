"""The reverse sweep: adjoints of a block of queries carried from the last step to the first."""

import abc
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.scaled import ScaledEngine
from hydragrad.hypergradient.stepping import linearized
from hydragrad.shapes import in_rows
from hydragrad.step.objective import Objective, Vectors
from hydragrad.step.optimizer_map import OptimizerMap
from hydragrad.step.updates import Linearization, Slots
from hydragrad.trajectory.moments import Moment

Sink = Callable[[Tensor, slice, Tensor, int], None]
"""``sink(ids [b], queries, terms [k, b], epoch)``: adds -terms to the scores."""


@final
@dataclass(frozen=True)
class Adjoint:
    """``lam`` = d m/dw, ``sig`` = d m/ds and ``bet`` = d m/dv of Q queries.

    One block ``[Q, *shape]`` a parameter, a parameter and slot, a buffer that training changes.
    """

    lam: list[Tensor]
    sig: list[Slots]
    bet: list[Tensor] = field(default_factory=list)

    def __len__(self) -> int:
        return self.lam[0].shape[0]

    def norms(self) -> Tensor:
        """||lam_q||, [Q]."""
        return torch.stack([in_rows(x).norm(dim=1) for x in self.lam]).norm(dim=0)

    def parts(self) -> Sequence[Tensor]:
        """What must stay finite, a tensor for each parameter."""
        return self.lam

    def rows(self, chosen: slice) -> "Adjoint":
        """Some of the queries, as views."""
        sig = [{slot: x[chosen] for slot, x in slots.items()} for slots in self.sig]
        return Adjoint([x[chosen] for x in self.lam], sig, [x[chosen] for x in self.bet])


def start(sensitivities: Vectors, slots: Sequence[tuple[str, ...]], buffers: Vectors = ()) -> Adjoint:
    """The adjoint at the end: lam_T = d m/d w_T, sig_T = 0, bet_T = d m/d v_T."""
    sig = [{slot: torch.zeros_like(x) for slot in names} for x, names in zip(sensitivities, slots, strict=True)]
    return Adjoint(list(sensitivities), sig, list(buffers))


def blocks(queries: int, block: int) -> Iterator[tuple[slice, int]]:
    """Blocks of one size over the queries, each with how many of its rows an earlier block did already.

    The last block reaches back rather than being smaller, so that engines see one shape only.
    """
    block = min(block, queries)
    for first in range(0, queries, block):
        begin = min(first, queries - block)
        yield slice(begin, begin + block), first - begin


def pull_update(adjoint: Adjoint, linearizations: Sequence[Linearization | None], gam: Sequence[Tensor]) -> None:
    """(lam, sig) <- VJP of U_t in (w, s), in place; ``gam`` is overwritten with the VJP in g."""
    for lam, sig, into, linearization in zip(adjoint.lam, adjoint.sig, gam, linearizations, strict=True):
        if linearization is None:  # no gradient came: the step left the parameter and its slots alone
            into.zero_()
        else:
            linearization.vjp_into(lam, sig, into)


def reverse_sweep(
    stretches: Iterable[Iterable[Moment]],
    objective: Objective,
    optimizer: OptimizerMap,
    engine: Engine,
    adjoint: Adjoint,
    block: int,
    sink: Sink,
    watch: Callable[[int, Adjoint], None],
) -> Adjoint:
    """Carry ``adjoint`` back over the moments, adding every example's terms to ``sink``; the adjoint at step 0.

        lam_t = lam~ + C_t gam + (dV/dw)^T bet,    bet_t = (dg/dv)^T gam + (dV/dv)^T bet

    Micro-batches pass the buffers on from one to the next, so they are taken last to first. All queries share the
    replayed step; ``block`` of them at a time go through the update and the engine while they are in the cache.
    ``watch(t, adjoint)`` sees every step. Moments come in ``stretches``, between which a replay may run, by the
    kernels of training, not those of derivatives.
    """
    gam = [torch.zeros_like(x[: min(block, len(adjoint))]) for x in adjoint.lam]
    for moments in stretches:
        with objective.differentiable():
            for moment in moments:
                _step_back(moment, objective, optimizer, engine, adjoint, gam, sink)
                watch(moment.record.index, adjoint)
    return adjoint


def _step_back(
    moment: Moment,
    objective: Objective,
    optimizer: OptimizerMap,
    engine: Engine,
    adjoint: Adjoint,
    gam: list[Tensor],
    sink: Sink,
) -> None:
    """``adjoint`` one step back, in place, block by block; ``gam``: room for one block."""
    clipping, linearizations = linearized(moment, optimizer)
    points = list(points_of(moment, objective))
    for chosen, skip in blocks(len(adjoint), len(gam[0])):
        new = slice(chosen.start + skip, chosen.stop)
        rows = adjoint.rows(new)
        fresh = [x[skip:] for x in gam]
        pull_update(rows, linearizations, fresh)
        clipping.pull_(fresh)
        bet = tuple(x[chosen] for x in adjoint.bet)
        for ids, epoch, point in reversed(points):
            curved, terms, bet = engine.products(point, tuple(gam), bet)
            for lam, c in zip(rows.lam, curved or (), strict=False):
                lam += c[skip:]
            sink(ids, new, terms[skip:], epoch)
        for held, b in zip(rows.bet, bet, strict=True):
            held.copy_(b[skip:])


class Direction(abc.ABC):
    """What multiplies every query's lam_T when C = 0: the adjoint of a vector of ones, elementwise."""

    @abc.abstractmethod
    def pull(self, linearizations: Sequence[Linearization | None]) -> Sequence[Tensor | float]:
        """One update back; the factor of gam, for each parameter."""

    @abc.abstractmethod
    def norms(self) -> Tensor:
        """The direction's norm, [1]."""

    @abc.abstractmethod
    def parts(self) -> Sequence[Tensor | float]:
        """What must stay finite, for each parameter."""


@final
class Uniform(Direction):
    """For linear updates (SGD) all elements of a parameter share one number: the paper's fixed direction."""

    def __init__(self, slots: Sequence[Sequence[str]]) -> None:
        self.lam = [1.0] * len(slots)
        self.sig = [dict.fromkeys(names, 0.0) for names in slots]

    def pull(self, linearizations: Sequence[Linearization | None]) -> Sequence[float]:
        scale = []
        for p, linearization in enumerate(linearizations):
            if linearization is None:
                scale.append(0.0)
                continue
            self.lam[p], self.sig[p], factor = linearization.pull_numbers(self.lam[p], self.sig[p])
            scale.append(factor)
        return scale

    def norms(self) -> Tensor:
        return torch.tensor([math.hypot(*self.lam)], dtype=torch.float64)

    def parts(self) -> Sequence[float]:
        return list(self.lam)


@final
class Elementwise(Direction):
    """For other updates every element has its own factor."""

    def __init__(self, like: Sequence[Tensor], slots: Sequence[tuple[str, ...]]) -> None:
        self.ones = start(tuple(torch.ones_like(x[:1]) for x in like), slots)
        self.scale = [torch.zeros_like(x) for x in self.ones.lam]

    def pull(self, linearizations: Sequence[Linearization | None]) -> Sequence[Tensor]:
        pull_update(self.ones, linearizations, self.scale)
        return [x[0] for x in self.scale]

    def norms(self) -> Tensor:
        return self.ones.norms()

    def parts(self) -> Sequence[Tensor]:
        return self.ones.lam


def direction_of(sensitivities: Vectors, slots: Sequence[tuple[str, ...]], optimizer: OptimizerMap) -> Direction:
    """The direction at the end of the run, all ones."""
    return Uniform(slots) if optimizer.update.linear else Elementwise(sensitivities, slots)


def _factors(moment: Moment, optimizer: OptimizerMap, direction: Direction) -> Sequence[Tensor | float]:
    """The direction one step back; what makes gam of every query's lam_T, for each parameter.

    Clipping by value is elementwise, so that behind it no number serves a whole parameter.
    """
    names, params, frozen = optimizer.names, moment.state.params, moment.record.frozen
    clipping, linearizations = linearized(moment, optimizer)
    scale = direction.pull(linearizations)
    if not moment.record.clips:  # a constant gradient passes nothing on
        return [0.0 if n in frozen else s for n, s in zip(names, scale, strict=True)] if frozen else scale
    whole = [s if isinstance(s, Tensor) else torch.full_like(params[n], s) for n, s in zip(names, scale, strict=True)]
    clipping.pull_(whole)
    return whole


def hessian_free_sweep(
    stretches: Iterable[Iterable[Moment]],
    objective: Objective,
    optimizer: OptimizerMap,
    engine: ScaledEngine,
    sensitivities: Vectors,
    slots: Sequence[tuple[str, ...]],
    block: int,
    sink: Sink,
    watch: Callable[[int, Direction], None],
) -> Direction:
    """The same with C = 0, where every map is elementwise: lam_t = d_t * lam_T, gam_t = e_t * lam_T.

    So one direction is carried instead of Q adjoints, and each step costs one product of the (scaled) per-example
    gradients with the fixed lam_T, the ``sensitivities``; ``slots`` are the optimizer's. Clipping by norm is not
    elementwise: such runs go through ``reverse_sweep``.
    """
    direction = direction_of(sensitivities, slots, optimizer)
    for moments in stretches:
        with objective.differentiable():
            for moment in moments:
                scale = _factors(moment, optimizer, direction)
                for ids, epoch, point in points_of(moment, objective):
                    for chosen, skip in blocks(len(sensitivities[0]), block):
                        terms = engine.terms(point, scale, tuple(x[chosen] for x in sensitivities))
                        sink(ids, slice(chosen.start + skip, chosen.stop), terms[skip:], epoch)
                watch(moment.record.index, direction)
    return direction
