"""The curvature of the mean training loss, as products with rows of vectors."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from hydragrad.baselines.gradients import Setting, flat, unflat
from hydragrad.errors import UnsupportedError, message
from hydragrad.hypergradient.costs import agree, probe_block
from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.engines import candidates, reference
from hydragrad.step.objective import Point
from hydragrad.trajectory.state import State

CURVATURES = ("hessian", "gauss-newton")
_TOGETHER = 32
"""Vectors per product: with more, the activations of a batch outgrow the caches."""


@final
class MeanCurvature:
    """V -> V C [k, P] at one state, where C is the Hessian of L(w) = (1/N) sum_i loss_i(w), or its J^T H J.

    Over the whole training set, ``batch`` examples at a time, in evaluation mode.
    """

    def __init__(self, setting: Setting, state: State, kind: str, batch: int) -> None:
        if kind not in CURVATURES:
            raise UnsupportedError(message("unknown curvature", expected=f"one of {CURVATURES}", got=repr(kind)))
        self.setting, self.state, self.batch = setting, state, batch
        self._kind = "exact" if kind == "hessian" else kind
        self._engine: Engine | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        total = torch.zeros_like(rows)
        for ids in self.setting.chunks(self.batch):
            total += self._sums(rows, ids)
        return total / self.setting.run.num_examples

    def on(self, ids: Tensor) -> Callable[[Tensor], Tensor]:
        """The product with the mean curvature of those examples alone."""
        return lambda rows: self._sums(rows, ids) / len(ids)

    def _sums(self, rows: Tensor, ids: Tensor) -> Tensor:
        point = self.setting.point(self.state, ids)
        with self.setting.objective.differentiable():
            engine = self._engine or self._choose(point)
            return torch.cat([self._product(engine, point, part) for part in rows.split(_TOGETHER)])

    def _product(self, engine: Engine, point: Point, rows: Tensor) -> Tensor:
        curved = engine.products(point, unflat(rows, point.params))[0]
        assert curved is not None
        return flat(curved).detach()

    def _choose(self, point: Point) -> Engine:
        """The first engine that runs and agrees with plain autograd on this model, else plain autograd.

        Never by the clock: the same call gives the same bits.
        """
        objective = self.setting.objective
        if self._kind == "gauss-newton":
            objective.check_split(point)
        plain, probe = reference(self._kind, objective), probe_block(point, 2)
        right = plain.products(point, probe)
        self._engine = plain
        for engine in candidates(self._kind, objective):
            try:
                agreed = agree(engine.products(point, probe), right)
            except (RuntimeError, NotImplementedError):
                continue
            if agreed:
                self._engine = engine
                break
        return self._engine
