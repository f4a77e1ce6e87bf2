"""Is a step repeatable? Taken again from the same state; if anything differs, which module's output does so first."""

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hydragrad.trajectory.replay import Replayer
from hydragrad.trajectory.state import State, StepRecord

TIMES = 3
"""How often a step is taken again: what depends on the order of atomic additions nearly always shows by then."""


@final
@dataclass(frozen=True)
class Nondeterminism:
    """What differed first when ``step`` was taken again from the same state with the same random numbers.

    ``module``: its name, of class ``kind`` (both empty: outside of every module); ``where``: its output (forward), the
    gradient of its parameters (backward), or only the parameters after the update; ``difference``: relative.
    """

    step: int
    module: str
    kind: str
    where: Literal["forward", "backward", "update"]
    difference: float

    def __str__(self) -> str:
        of = f"module {self.module!r} ({self.kind})" if self.kind else "no module in particular"
        what = {
            "forward": f"the output of {of}",
            "backward": f"the gradient of {of}",
            "update": "the parameters after the optimizer's update",
        }[self.where]
        return (
            f"step {self.step} taken again from the same state gives something else, first in {what}, by "
            f"{self.difference:.1e} relative: a non-deterministic kernel (torch.use_deterministic_algorithms(True) "
            "avoids or names it), or random numbers that neither torch nor numpy nor Python's random drew"
        )


def repeated(replayer: Replayer, state: State, record: StepRecord, times: int = TIMES) -> Nondeterminism | None:
    """Take ``record`` from ``state`` again and again; what differed first, None if all was equal bit for bit."""
    first = _take(replayer, state, record)
    for _ in range(times):
        found = _difference(replayer.module, first, _take(replayer, state, record), record.index)
        if found is not None:
            return found
    return None


class _Taken(NamedTuple):
    outputs: list[tuple[str, list[Tensor]]]  # of every module's every call, innermost first
    gradients: Mapping[str, Tensor]
    after: Mapping[str, Tensor]


def _take(replayer: Replayer, state: State, record: StepRecord) -> _Taken:
    outputs: list[tuple[str, list[Tensor]]] = []
    replayer.restore(state)
    with _listening(replayer.module, outputs):
        replayer.advance(record, compare=False)
    gradients = {name: g.clone() for name, g in replayer.gradients().items()}
    return _Taken(outputs, gradients, replayer.state().params)


@contextlib.contextmanager
def _listening(module: nn.Module, outputs: list[tuple[str, list[Tensor]]]) -> Iterator[None]:
    def hear(name: str, part: nn.Module, given: Any, out: Any) -> None:
        tensors = [x.detach().clone() for x in pytree.tree_leaves(out) if isinstance(x, Tensor)]
        outputs.append((name, tensors))

    with contextlib.ExitStack() as stack:
        for name, part in module.named_modules():
            stack.callback(part.register_forward_hook(partial(hear, name)).remove)
        yield


def _difference(module: nn.Module, a: _Taken, b: _Taken, step: int) -> Nondeterminism | None:
    parts = dict(module.named_modules())
    for (name, ours), (other, theirs) in zip(a.outputs, b.outputs, strict=False):
        apart = (
            float("inf")
            if name != other
            else max((_apart(x, y) for x, y in zip(ours, theirs, strict=False)), default=0)
        )
        if apart:
            return Nondeterminism(step, name, type(parts[name]).__name__, "forward", apart)
    called = [name for name, _ in a.outputs]
    gaps = {name: _apart(g, b.gradients[name]) for name, g in a.gradients.items() if name in b.gradients}
    owners = {name.rpartition(".")[0]: gap for name, gap in gaps.items() if gap}
    if owners:  # a backward pass comes by the modules last to first
        owner = max(owners, key=lambda name: called.index(name) if name in called else -1)
        return Nondeterminism(step, owner, type(parts[owner]).__name__, "backward", owners[owner])
    apart = max((_apart(x, b.after[name]) for name, x in a.after.items()), default=0.0)
    return Nondeterminism(step, "", "", "update", apart) if apart else None


def _apart(a: Tensor, b: Tensor) -> float:
    """Relative difference; 0.0 if equal bit for bit (NaN equals NaN)."""
    if a.shape != b.shape:
        return float("inf")
    differ = (a != b) & ~((a != a) & (b != b))
    if not bool(differ.any()):
        return 0.0
    x, y = a[differ].to(torch.complex128 if a.is_complex() else torch.float64), b[differ]
    return float((x - y).abs().max() / a.abs().max().clamp_min(1e-30).to(torch.float64))
