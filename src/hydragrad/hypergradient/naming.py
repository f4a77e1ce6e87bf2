"""Engines by name: one that was chosen is made again, in another process, to round alike."""

from hydragrad.errors import UnsupportedError, message
from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.engines import candidates, reference
from hydragrad.hypergradient.output_jacobian import OutputJacobian
from hydragrad.hypergradient.scaled import Direct, PerExampleGradients, ScaledEngine
from hydragrad.hypergradient.tracing import Traced, TracedFunction
from hydragrad.step.objective import Objective


def name_of(engine: Engine | ScaledEngine) -> str:
    """The name under which ``named`` makes it again: plain, traced or compiled, a colon, its class's name."""
    inner = engine.engine if isinstance(engine, Direct) else engine
    if isinstance(inner, Traced):
        return f"{'compiled' if inner.function.compile else 'traced'}:{inner.engine.name}"
    return f"plain:{inner.name}"


def named(objective: Objective, method: str, name: str, *, elementwise: bool) -> Engine | ScaledEngine:
    """The engine of that name, made anew, of which every function traces its first form alone.

    So no result's rounding depends on what was called before. ``elementwise``: whether one direction serves all queries
    (see Sweep). Raises UnsupportedError for a name that there is not.
    """
    kind, _, base = name.partition(":")
    engines: list[Engine | ScaledEngine] = [reference(method, objective), *candidates(method, objective)]
    if kind == "plain" and method == "hessian-free":
        engines.append(PerExampleGradients(objective))
    if kind == "plain" and method == "gauss-newton":
        engines.append(OutputJacobian(objective))
    engine = next((engine for engine in engines if engine.name == base), None)
    if engine is None or kind not in ("plain", "traced", "compiled"):
        raise UnsupportedError(
            message(f"there is no engine {name!r} for {method}", expected=", ".join(e.name for e in engines))
        )
    if kind != "plain":
        assert isinstance(engine, Engine)
        engine = Traced(engine, compile=kind == "compiled")
    _settle(engine)
    free = isinstance(engine, Engine) and method == "hessian-free" and elementwise
    return Direct(engine) if free and isinstance(engine, Engine) else engine


def _settle(engine: Engine | ScaledEngine) -> None:
    for part in vars(engine).values():
        if isinstance(part, TracedFunction):
            part.settled = True
        elif isinstance(part, (Engine, ScaledEngine)):
            _settle(part)
