"""State that a model keeps in Python from one call to the next: no recording sees it, no replay can restore it."""

from collections.abc import Iterator, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from hydragrad.errors import UnsupportedError, message
from hydragrad.trajectory.agreement import tolerance
from hydragrad.trajectory.replay import Replayer
from hydragrad.trajectory.state import State, StepRecord

_OF_TORCH = frozenset(vars(nn.Module()))
_NUMBERS = (bool, int, float)
_LONGEST = 1000

Place = tuple[str, str, int]
"""The name of a submodule, of its attribute, and which of the values in that (0, unless it is a container)."""


@final
class Glance:
    """The plain attributes of a model's modules, cheap to look at: equal to another glance if nothing has changed."""

    def __init__(self, module: nn.Module) -> None:
        self._seen = {place: _mark(value) for place, value in _values(module)}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Glance) and self._seen == other._seen

    __hash__ = None  # type: ignore[assignment]


def refuse_hidden_state(replayer: Replayer, begin: State, step: StepRecord) -> None:
    """Refuse a model whose gradient depends on plain attributes that its own calls go on changing.

    The step is taken again and again from one state. What changes once is a cache, what changes without being read is
    a log; both are harmless. What goes on changing is set to other values: if the gradient follows, it is state.
    Raises UnsupportedError, naming the module and the attribute.
    """

    def take() -> list[Tensor]:
        replayer.restore(begin)
        replayer.advance(step, compare=False)
        after = replayer.state()
        return [*(g.clone() for g in replayer.gradients().values()), *after.params.values(), *after.buffers.values()]

    taken = [(take(), _copied(replayer.module)) for _ in range(3)]
    (usual, first), (_, second), (_, third) = taken
    moving = [p for p, value in third.items() if not _same(value, second.get(p)) or not _same(value, first.get(p))]
    if not moving:
        return

    def shifted(places: list[Place], by: int) -> list[Tensor]:
        for place in moving:
            _put(replayer.module, place, third[place], by if place in places else 0)
        try:
            return take()
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError, ZeroDivisionError):
            return []  # it cannot even run: it depends on them

    others = [one for one, _ in taken] + [shifted(moving, by) for by in (1, 10**6)]
    if all(_agree(usual, other) for other in others):
        return
    base = shifted([], 0)
    alone = (p for by in (1, 10**6) for p in moving if not _agree(base, shifted([p], by)))
    name, attribute, _ = place = next(alone, moving[0])
    kind = type(replayer.module.get_submodule(name)).__name__
    raise UnsupportedError(
        message(
            f"module {name!r} ({kind}) keeps {attribute!r} in Python from one call to the next, and its output depends "
            "on such a value",
            expected="state in buffers and parameters",
            got=f"{attribute} = {_told(first.get(place))} after one call, {_told(third[place])} after others",
            cause="a counter of steps, a warm-up or a moving average as a plain attribute: no recording sees it, so no "
            "replay can restore it",
            remedy=f"self.register_buffer({attribute!r}, torch.tensor(...)), changed in place, and record again",
        )
    )


def _values(module: nn.Module) -> Iterator[tuple[Place, Any]]:
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute in _OF_TORCH or isinstance(value, nn.Module):
                continue
            leaves = [value]
            if isinstance(value, (list, tuple, dict)):
                leaves = pytree.tree_leaves(value) if len(value) <= _LONGEST else []  # a vocabulary, say
            for place, leaf in enumerate(leaves):
                if isinstance(leaf, (*_NUMBERS, Tensor)) and not isinstance(leaf, nn.Parameter):
                    yield (name, attribute, place), leaf


def _mark(value: Any) -> Any:
    return (id(value), value._version) if isinstance(value, Tensor) else value


def _copied(module: nn.Module) -> Mapping[Place, Any]:
    return {p: value.detach().clone() if isinstance(value, Tensor) else value for p, value in _values(module)}


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(((a == b) | ((a != a) & (b != b))).all())
    return type(a) is type(b) and bool(a == b or (a != a and b != b))


def _put(module: nn.Module, place: Place, value: Any, by: int) -> None:
    """That value, or another one, in an attribute by itself (what lies in containers stays)."""
    name, attribute, _ = place
    held = vars(module.get_submodule(name))
    if isinstance(held[attribute], (*_NUMBERS, Tensor)):
        held[attribute] = _shifted(value, by)


def _shifted(value: Any, by: int) -> Any:
    if isinstance(value, Tensor):
        changed = ~value if value.dtype == torch.bool else value + by
        return changed if by else value.clone()
    return (not value if by else value) if isinstance(value, bool) else value + by


def _agree(usual: list[Tensor], other: list[Tensor]) -> bool:
    def near(a: Tensor, b: Tensor) -> bool:
        if not a.is_floating_point():
            return torch.equal(a, b)
        return float((a - b).norm()) <= tolerance(a.dtype) * float(a.norm())

    return len(usual) == len(other) and all(near(a, b) for a, b in zip(usual, other, strict=True))


def _told(value: Any) -> str:
    return f"a tensor of norm {float(value.double().norm()):.4g}" if isinstance(value, Tensor) else repr(value)
