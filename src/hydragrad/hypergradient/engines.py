"""The engines there are, by method: which one is right to compare with, which ones may be faster."""

from collections.abc import Sequence
from typing import Literal, get_args

from hydragrad.errors import UnsupportedError, message
from hydragrad.hypergradient import exact, gauss_newton, hessian_free
from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.penalised import Penalised
from hydragrad.step.objective import Objective

Method = Literal["exact", "gauss-newton", "hessian-free"]
METHODS: tuple[str, ...] = get_args(Method)


def check_method(method: str) -> None:
    """Refuse a method that is none of METHODS."""
    if method not in METHODS:
        raise UnsupportedError(message("unknown method", expected=f"one of {', '.join(METHODS)}", got=repr(method)))


def reference(method: str, objective: Objective) -> Engine:
    """The engine that asks least of torch: plain autograd, one vector at a time."""
    check_method(method)
    if method == "exact":
        return exact.DoubleBackward(objective)
    if method == "gauss-newton":
        return _with_penalty(gauss_newton.DoubleVjp(objective), plain=True)
    return hessian_free.DoubleVjp(objective)


def candidates(method: str, objective: Objective) -> Sequence[Engine]:
    """Engines worth measuring against the reference, most promising first."""
    if method == "exact":
        return (exact.ReverseOverReverse(objective), exact.ForwardOverReverse(objective))
    if method == "gauss-newton":
        return (_with_penalty(gauss_newton.JvpThenVjp(objective), plain=False),)
    return (hessian_free.Jvp(objective),)


def _with_penalty(engine: Engine, *, plain: bool) -> Engine:
    return engine if engine.objective.problem.penalty is None else Penalised(engine, plain=plain)
