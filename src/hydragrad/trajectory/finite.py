"""NaN and infinities in a replayed run: which step and which tensor they came from."""

from collections.abc import Mapping

from torch import Tensor

from hydragrad.errors import NonFiniteError, message
from hydragrad.trajectory.replay import Replayer
from hydragrad.trajectory.state import State
from hydragrad.trajectory.store import Trajectory


def check_finite(state: State, replayer: Replayer, trajectory: Trajectory, weights: Tensor | None = None) -> None:
    """Refuse a state whose parameters or buffers are not finite, though they were when training began.

    Looking costs one pass over them. Only where it finds something are the steps replayed once more (with the
    ``weights`` of that replay), to name the first tensor: a gradient, or a parameter or buffer after a step.
    """
    found = _not_finite(state.params) + _not_finite(state.buffers)
    if not found:
        return
    first = trajectory.state(0)
    begun = {*_not_finite(first.params), *_not_finite(first.buffers)}
    found = [name for name in found if name not in begun]
    if not found:
        return  # a mask of infinities, say, that does not train
    where, names = _first(state.step, replayer, trajectory, weights, begun)
    if not names:
        where, names = f"the state at step {state.step}: {_kind(found[0], state.params)} {found[0]!r}", found
    raise NonFiniteError(
        message(
            f"{where} is not finite",
            expected="finite gradients, parameters and buffers at every step",
            got=f"NaN or infinity in {', '.join(map(repr, names[:4]))}{' and others' if len(names) > 4 else ''}",
            cause="training diverged (a learning rate that is too large), a loss with an infinite slope, or NaN in its "
            "data"
            + ("; or NaN in a batch that BatchNorm saw in training mode, skipped or not" if state.buffers else "")
            + ("" if weights is None else ", with these weights of the examples"),
            remedy="ask an earlier step (until=, step=), or train with a smaller learning rate"
            + (", and look at a batch's inputs before the model does" if state.buffers else ""),
        )
    )


def _first(
    stop: int, replayer: Replayer, trajectory: Trajectory, weights: Tensor | None, begun: set[str]
) -> tuple[str, list[str]]:
    start = trajectory.state(0)
    for step in (t for t in trajectory.checkpoints if weights is None and 0 < t < stop):
        stored = trajectory.state(step)
        if {*_not_finite(stored.params), *_not_finite(stored.buffers)} - begun:
            break
        start = stored
    replayer.restore(start)
    params = dict(replayer.module.named_parameters())
    for record in trajectory.steps[start.step : stop]:
        replayer.advance(record, weights, compare=False)
        gradients = {name: p.grad for name, p in params.items() if p.grad is not None}
        if names := _not_finite(gradients):
            return f"at step {record.index} the gradient of parameter {names[0]!r}", names
        after = {**params, **dict(replayer.module.named_buffers())}
        if names := [name for name in _not_finite(after) if name not in begun]:
            return f"after step {record.index} the {_kind(names[0], params)} {names[0]!r}", names
    return "", []


def _kind(name: str, params: Mapping[str, Tensor]) -> str:
    return "parameter" if name in params else "buffer"


def _not_finite(tensors: Mapping[str, Tensor]) -> list[str]:
    return [name for name, x in tensors.items() if not bool(x.isfinite().all())]
