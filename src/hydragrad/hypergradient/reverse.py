"""The reverse sweep: adjoints of a block of queries carried from the last step to the first."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import final

import torch
from torch import Tensor

from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.scaled import ScaledEngine
from hydragrad.step.objective import Objective, Vectors
from hydragrad.step.optimizer_map import OptimizerMap
from hydragrad.step.updates import Linearization, Slots
from hydragrad.trajectory.moments import Moment

Sink = Callable[[Tensor, slice, Tensor, int], None]
"""``sink(ids [b], queries, terms [k, b], epoch)``: adds -terms to the scores."""


@final
@dataclass
class Adjoint:
    """``lam`` = d m/dw and ``sig`` = d m/ds of Q queries, one block ``[Q, *shape]`` a parameter (and slot)."""

    lam: list[Tensor]
    sig: list[Slots]
    gam: list[Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        """``gam``: room for d m/dg, overwritten at every step."""
        self.gam = self.gam or [torch.empty_like(x) for x in self.lam]

    def norms(self) -> Tensor:
        """||lam_q||, [Q]."""
        return torch.stack([x.flatten(1).norm(dim=1) for x in self.lam]).norm(dim=0)


def blocks(queries: int, block: int) -> Iterator[tuple[slice, int]]:
    """Blocks of one size over the queries, each with how many of its rows an earlier block did already.

    The last block reaches back rather than being smaller, so that engines see one shape only.
    """
    block = min(block, queries)
    for first in range(0, queries, block):
        begin = min(first, queries - block)
        yield slice(begin, begin + block), first - begin


def start(sensitivities: Vectors, slots: Sequence[tuple[str, ...]]) -> Adjoint:
    """The adjoint at the end: lam_T = d m/d w_T, sig_T = 0."""
    sig = [{slot: torch.zeros_like(x) for slot in names} for x, names in zip(sensitivities, slots, strict=True)]
    return Adjoint([x.clone() for x in sensitivities], sig)


def pull_update(adjoint: Adjoint, linearizations: Sequence[Linearization | None]) -> list[Tensor]:
    """(lam, sig) <- VJP of U_t in (w, s), in place of the adjoint; returns gam, the VJP in g."""
    gam = []
    for p, linearization in enumerate(linearizations):
        if linearization is None:  # no gradient came: the step left the parameter and its slots alone
            gam.append(torch.zeros_like(adjoint.lam[p]))
            continue
        gam.append(adjoint.gam[p])
        linearization.vjp_into(adjoint.lam[p], adjoint.sig[p], gam[p])
    return gam


def reverse_sweep(
    moments: Iterable[Moment],
    objective: Objective,
    optimizer: OptimizerMap,
    engine: Engine,
    adjoint: Adjoint,
    block: int,
    sink: Sink,
    watch: Callable[[int, Adjoint], None],
) -> Adjoint:
    """Carry ``adjoint`` back over ``moments``, adding every example's terms to ``sink``; the adjoint at step 0.

    ``lam_t = lam~ + C_t gam``; the engine takes ``block`` queries at a time, all share the replayed step.
    ``watch(t, adjoint)`` sees every step.
    """
    queries = adjoint.lam[0].shape[0]
    for moment in moments:
        linearizations = optimizer.linearize(
            moment.state.params, moment.state.optimizer, moment.gradient, moment.record.groups
        )
        gam = pull_update(adjoint, linearizations)
        for ids, epoch, point in points_of(moment, objective):
            for chosen, skip in blocks(queries, block):
                curved, terms = engine.products(point, tuple(x[chosen] for x in gam))
                new = slice(chosen.start + skip, chosen.stop)
                for lam, c in zip(adjoint.lam, curved or (), strict=False):
                    lam[new] += c[skip:]
                sink(ids, new, terms[skip:], epoch)
        watch(moment.record.index, adjoint)
    return adjoint


def hessian_free_sweep(
    moments: Iterable[Moment],
    objective: Objective,
    optimizer: OptimizerMap,
    engine: ScaledEngine,
    adjoint: Adjoint,
    block: int,
    sink: Sink,
    watch: Callable[[int, Adjoint], None],
) -> Adjoint:
    """The same with C = 0, where every map is elementwise: lam_t = d_t * lam_T, gam_t = e_t * lam_T.

    So one adjoint of ones is carried instead of Q, and each step costs one product of the (scaled) per-example
    gradients with the fixed lam_T. For SGD, d_t and e_t are single numbers: the paper's fixed direction.
    """
    ones = start(tuple(torch.ones_like(x[:1]) for x in adjoint.lam), [tuple(s) for s in adjoint.sig])
    queries = adjoint.lam[0].shape[0]
    for moment in moments:
        linearizations = optimizer.linearize(
            moment.state.params, moment.state.optimizer, moment.gradient, moment.record.groups
        )
        scale = tuple(x[0] for x in pull_update(ones, linearizations))
        for ids, epoch, point in points_of(moment, objective):
            for chosen, skip in blocks(queries, block):
                terms = engine.terms(point, scale, tuple(x[chosen] for x in adjoint.lam))
                sink(ids, slice(chosen.start + skip, chosen.stop), terms[skip:], epoch)
        watch(moment.record.index, ones)
    return ones
