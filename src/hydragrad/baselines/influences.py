"""Influence functions at the trained parameters, and RelatIF: one linear system per query (or per example)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from hydragrad.attribution import Attribution
from hydragrad.baselines.curvatures import CURVATURES, MeanCurvature
from hydragrad.baselines.gradients import MEMORY, Setting
from hydragrad.baselines.solvers import Solved, conjugate_gradients, dense, explicit, lissa
from hydragrad.errors import NonFiniteError, UnsupportedError, message
from hydragrad.run import Run
from hydragrad.shapes import Float
from hydragrad.trajectory.state import State

SOLVERS = ("cg", "lissa", "dense")
_ITERATIONS = {"cg": 100, "lissa": 5000, "dense": 0}
_WORKING_ROWS = 6
"""Vectors that an iteration keeps per right-hand side."""


@final
@dataclass(frozen=True)
class Inverse:
    """How (C + damping I)^{-1} is applied; see ``influence`` for the fields."""

    solver: str = "cg"
    curvature: str = "hessian"
    damping: float = 0.01
    iterations: int | None = None
    tolerance: float = 1e-5
    scale: float = 1000.0
    repeats: int = 3
    batch: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("solver", SOLVERS), ("curvature", CURVATURES)):
            if getattr(self, name) not in known:
                raise UnsupportedError(
                    message(f"unknown {name}", expected=f"one of {known}", got=repr(getattr(self, name)))
                )
        least = {"damping": 0.0, "iterations": 1, "tolerance": 0.0, "scale": 1e-30, "repeats": 1, "batch": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UnsupportedError(message(f"{name} is too small", expected=f"at least {low}", got=value))

    def __str__(self) -> str:
        words = f"{self.curvature} of the mean training loss at the last step, damping {self.damping:g}, {self.solver}"
        if self.solver == "cg":
            return f"{words} of at most {self.steps} iterations to {self.tolerance:g}"
        if self.solver == "lissa":
            return (
                f"{words} of {self.steps} iterations on batches of {self.batch}, scale {self.scale:g}, "
                f"{self.repeats} repeats"
            )
        return words

    @property
    def steps(self) -> int:
        """Iterations, the default filled in."""
        return self.iterations or _ITERATIONS[self.solver]

    def at(self, setting: Setting, state: State) -> "Solver":
        """Ready to solve at a state."""
        return Solver(self, setting, MeanCurvature(setting, state, self.curvature, self.batch))


@final
class Solver:
    """rows [k, P] -> rows (C + damping I)^{-1}; remembers how well that went."""

    def __init__(self, how: Inverse, setting: Setting, mean: MeanCurvature) -> None:
        self.how, self.setting, self.mean = how, setting, mean
        self.residual, self.stopped = 0.0, 0
        self._matrix: Tensor | None = None
        self._generator = torch.Generator().manual_seed(how.seed)

    def __call__(self, rows: Tensor) -> Tensor:
        parts = [self._solve(part) for part in rows.split(max(1, self.setting.room // _WORKING_ROWS))]
        self.residual = max(self.residual, *(part.residual for part in parts))
        self.stopped += sum(part.stopped for part in parts)
        return torch.cat([part.x for part in parts])

    def _solve(self, rows: Tensor) -> Solved:
        how = self.how
        if how.solver == "cg":
            return conjugate_gradients(self._damped(self.mean), rows, how.steps, how.tolerance)
        if how.solver == "lissa":
            return lissa(self._sample, rows, how.steps, how.scale, how.repeats)
        if self._matrix is None:
            self._matrix = explicit(self._damped(self.mean), rows.shape[1], 64, rows)
        return dense(self._matrix, rows)

    def _damped(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda rows: product(rows) + self.how.damping * rows

    def _sample(self) -> Callable[[Tensor], Tensor]:
        count = self.setting.run.num_examples
        if self.how.batch >= count:  # nothing is left to chance
            return self._damped(self.mean)
        return self._damped(self.mean.on(torch.randint(count, (self.how.batch,), generator=self._generator)))

    def reasons(self) -> tuple[str, ...]:
        """What a reader should know of the solutions."""
        found = []
        if self.how.solver == "lissa":
            found.append(f"LiSSA still moved by {self.residual:.1e} (relative) in its last iteration")
        elif self.residual > 10 * max(self.how.tolerance, 1e-8):
            found.append(f"the linear systems are solved to a relative residual of {self.residual:.1e} only")
        if self.stopped:
            found.append(
                f"{self.stopped} systems met negative curvature and were left unfinished: raise damping, or choose "
                "curvature='gauss-newton'"
            )
        return tuple(found)


def influence(
    run: Run,
    queries: Any,
    *,
    solver: str = "cg",
    curvature: str = "hessian",
    damping: float = 0.01,
    iterations: int | None = None,
    tolerance: float = 1e-5,
    scale: float = 1000.0,
    repeats: int = 3,
    batch: int = 256,
    layer: str | None = None,
    measurement: Callable[[nn.Module, Any], Tensor] | None = None,
    memory: int = MEMORY,
    seed: int = 0,
) -> Attribution:
    """Influence functions (Koh and Liang, 2017) at the trained parameters w_T, as if they minimised the training loss.

        score[i, j] = grad m_j^T (C + damping I)^{-1} grad loss_i / N

    C: the Hessian of the mean loss over the whole training set (``curvature="gauss-newton"``: J^T H J), evaluation
    mode; sign and scale of ``hydragrad.attribute``: the first-order rise of m_j when example i is removed. A coupled
    weight decay belongs to the objective: add it to ``damping``. ``solver``: "cg" (at most ``iterations`` products,
    100, to a residual ``tolerance``), "lissa" (``iterations`` 5000, on random batches, with ``scale`` and ``repeats``)
    or "dense" (the matrix [P, P]). ``batch``: examples per product; ``layer``: count that module's parameters only;
    ``memory``: bytes for flat gradients. Raises MismatchError, UnsupportedError, NonFiniteError. Source: arXiv
    1703.04730. Example: ``hydragrad.baselines.influence(run, test_set, damping=0.1).top(query=3)``.
    """
    how = Inverse(solver, curvature, damping, iterations, tolerance, scale, repeats, batch, seed)
    setting = Setting(run, queries, layer=layer, measurement=measurement, memory=memory)
    state = setting.end()
    inverse = how.at(setting, state)
    values = setting.products(state, inverse) / run.num_examples
    return setting.answer(values, f"influence-{solver}", f"influence functions: {how}", inverse.reasons())


def relatif(
    run: Run,
    queries: Any,
    *,
    kind: str = "theta",
    solver: str = "cg",
    curvature: str = "gauss-newton",
    damping: float = 0.01,
    iterations: int | None = None,
    tolerance: float = 1e-5,
    batch: int = 256,
    layer: str | None = None,
    measurement: Callable[[nn.Module, Any], Tensor] | None = None,
    memory: int = MEMORY,
) -> Attribution:
    """RelatIF (Barshan, Brunet, Dziugaite, 2020): influence relative to an example's global effect.

        theta: grad m_j^T A^{-1} g_i / ||A^{-1} g_i||        l: grad m_j^T A^{-1} g_i / sqrt(g_i^T A^{-1} g_i)

    with g_i = grad loss_i and A = C + damping I as in ``influence``: examples that move everything no longer top every
    query. Signs are those of ``influence``; the scale is not that of a removal. One linear system per training example
    as well as per query. Raises what ``influence`` raises; UnsupportedError for an unknown kind. Source: arXiv
    2003.11630. Example: ``hydragrad.baselines.relatif(run, test_set, kind="l")``.
    """
    if kind not in ("theta", "l"):
        raise UnsupportedError(message("unknown kind of RelatIF", expected="'theta' or 'l'", got=repr(kind)))
    how = Inverse(solver, curvature, damping, iterations, tolerance, batch=batch)
    setting = Setting(run, queries, layer=layer, measurement=measurement, memory=memory)
    state = setting.end()
    inverse = how.at(setting, state)
    norms = _effects(setting, state, inverse, kind).unsqueeze(1)
    values = setting.products(state, inverse) / norms
    return setting.answer(values, f"relatif-{kind}", f"{kind}-relative influence: {how}", inverse.reasons())


def self_influence(
    run: Run,
    *,
    solver: str = "cg",
    curvature: str = "gauss-newton",
    damping: float = 0.01,
    iterations: int | None = None,
    tolerance: float = 1e-5,
    batch: int = 256,
    layer: str | None = None,
    memory: int = MEMORY,
) -> Float[Tensor, " N"]:
    """Influence of every training example on its own loss, g_i^T A^{-1} g_i / N: large for unusual or wrong ones.

    Arguments as in ``influence``; one linear system per training example. On the CPU, in the run's dtype.
    Example: ``hydragrad.baselines.self_influence(run, layer="classifier").argsort(descending=True)``.
    """
    setting = Setting(run, layer=layer, memory=memory)
    state = setting.end()
    how = Inverse(solver, curvature, damping, iterations, tolerance, batch=batch)
    return _effects(setting, state, how.at(setting, state), "l").square() / run.num_examples


def _effects(setting: Setting, state: State, inverse: Solver, kind: str) -> Tensor:
    """||A^{-1} g_i|| or sqrt(g_i^T A^{-1} g_i) of every training example, [N] on the CPU."""
    found = torch.empty(setting.run.num_examples, dtype=setting.dtype)
    for ids, rows in setting.rows(state):
        solved = inverse(rows)
        squares = (solved * (solved if kind == "theta" else rows)).sum(1)
        found[ids] = squares.cpu()
    if bool((found < 0).any()):
        raise NonFiniteError(
            message(
                "an example's influence on itself is negative",
                expected="a positive definite C + damping I",
                cause="the Hessian has eigenvalues below -damping",
                remedy="raise damping, or choose curvature='gauss-newton'",
            )
        )
    return found.sqrt().clamp_min(torch.finfo(setting.dtype).tiny)
