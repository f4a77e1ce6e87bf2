"""The hyperparameters of an optimizer's param groups: noted while recording, given back for replay."""

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.files import dumps
from hydragrad.trajectory.state import Hyper

TENSORS = "tensors"
"""Beside the hyperparameters, where any of them are tensors: rows (name, dtype, dimensions, device's type).

A learning rate given as a tensor is rounded to its dtype by what torch computes with it, and a number is not.
"""


def check_optimizer(optimizer: Any) -> None:
    """Refuse what is none of torch's optimizers, or several of them."""
    if not isinstance(optimizer, Optimizer):
        raise UnsupportedError(
            message(
                "not an optimizer",
                expected="one torch.optim optimizer",
                got=type(optimizer).__name__,
                cause="several optimizers, of which a recording follows one"
                if isinstance(optimizer, (list, tuple, dict))
                else "an optimizer of another library, or a wrapper around one",
                remedy="give one optimizer all parameters, in param groups with hyperparameters of their own: "
                "torch.optim.AdamW([{'params': a, 'lr': 0.1}, {'params': b, 'lr': 0.01}])",
            )
        )


def group_names(params: dict[str, Tensor], optimizer: Optimizer) -> list[list[str]]:
    """Names of the parameters of each group, in the optimizer's order."""
    check_optimizer(optimizer)
    for name, param in params.items():
        if is_lazy(param):
            raise UnsupportedError(
                message(f"parameter {name!r} has no shape yet", remedy="run the model once before recording it")
            )
    names = {id(param): name for name, param in params.items()}
    groups = []
    for place, group in enumerate(optimizer.param_groups):
        if any(id(param) not in names for param in group["params"]):
            raise MismatchError(
                message(
                    f"param group {place} of the optimizer holds a tensor that is no parameter of the model",
                    expected="parameters of the model given to hydragrad.record",
                    cause="the optimizer was made for another model, or before the model's parameters were replaced",
                    remedy="give the model and the optimizer that train together",
                )
            )
        groups.append([names[id(param)] for param in group["params"]])
    return groups


def hyperparameters(optimizer: Optimizer, names: list[list[str]]) -> tuple[Hyper, ...]:
    """Each group's hyperparameters as plain values; of tensors (a learning rate may be one) their number and form."""
    if [len(group["params"]) for group in optimizer.param_groups] != [len(group) for group in names]:
        raise UnsupportedError(
            message(
                "the optimizer's param groups changed during the recording",
                expected=f"groups of {[len(group) for group in names]} parameters",
                got=f"{[len(group['params']) for group in optimizer.param_groups]}",
                remedy="record each phase of training as a run of its own",
            )
        )
    return tuple(_described(group) for group in optimizer.param_groups)


def _described(group: Mapping[str, Any]) -> Hyper:
    held = _held(group)
    forms = []
    for key, value in held.items():
        first = value[0] if isinstance(value, (tuple, list)) and value else value  # betas: all or none are tensors
        if isinstance(first, Tensor):
            dtype = str(first.dtype).removeprefix("torch.")
            forms.append((key, dtype, first.dim(), first.device.type))
    plain = {key: _plain(value) for key, value in held.items()}
    return {**plain, TENSORS: tuple(forms)} if forms else plain


def as_held(hyper: Hyper, device: torch.device) -> dict[str, Any]:
    """The hyperparameters as a param group holds them, tensors among them on the CPU or on ``device`` as recorded."""
    held = {key: value for key, value in hyper.items() if key != TENSORS}
    for key, dtype, dims, where in hyper.get(TENSORS, ()):
        on = torch.device("cpu") if where == "cpu" else device

        def made(value: float, dtype: str = dtype, dims: int = dims, on: torch.device = on) -> Tensor:
            return torch.tensor(value, dtype=getattr(torch, dtype), device=on).reshape([1] * dims)

        held[key] = tuple(map(made, held[key])) if isinstance(held[key], tuple) else made(held[key])
    return held


def are_forms(hyper: Hyper) -> bool:
    """Whether what is said of tensors among the hyperparameters makes sense."""
    rows = hyper.get(TENSORS, ())
    return isinstance(rows, tuple) and all(_is_form(row, hyper) for row in rows)


def _is_form(row: Any, hyper: Hyper) -> bool:
    if not isinstance(row, tuple) or len(row) != 4 or row[1] not in ("float16", "bfloat16", "float32", "float64"):
        return False
    name, _, dims, device = row
    value = hyper.get(name, None) if isinstance(name, str) and name != TENSORS else None
    numbers = value if isinstance(value, tuple) else (value,)
    return dims in (0, 1) and isinstance(device, str) and all(type(n) in (int, float) for n in numbers)


@final
class HyperNotes:
    """Hyperparameters of an optimizer's param groups, the same tuple until one changes.

    ``names``: of each group's parameters. Comparing the groups as they lie there costs a microsecond; only what that
    cannot tell (tensors and lists, which change in place) is made plain at every step.
    """

    def __init__(self, params: dict[str, Tensor], optimizer: Optimizer) -> None:
        self.names = group_names(params, optimizer)
        self._optimizer = optimizer
        self._sizes = [len(names) for names in self.names]
        self._seen: list[dict[str, Any]] = []
        self._last: tuple[Hyper, ...] = ()

    def now(self) -> tuple[Hyper, ...]:
        """As ``hyperparameters``."""
        groups = self._optimizer.param_groups
        whole = [len(group["params"]) for group in groups] == self._sizes
        if whole and groups == self._seen:
            return self._last
        found = tuple(_held(group) for group in groups)
        fixed = whole and all(_is_fixed(value) for held in found for value in held.values())
        if not fixed:
            found = hyperparameters(self._optimizer, self.names)
        if found != self._last:
            self._last = found
        self._seen = [dict(group) for group in groups] if fixed else []
        return self._last


def _held(group: Mapping[str, Any]) -> Hyper:
    return {key: value for key, value in group.items() if key not in _NOT_HYPER}


def _is_fixed(value: Any) -> bool:
    """Whether it is plain already, and does not change in place."""
    return type(value) in _FIXED or (type(value) is tuple and all(type(part) in _FIXED for part in value))


_NOT_HYPER = ("params", "param_names")
_FIXED = frozenset({type(None), bool, int, float, str})


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (tuple, list)):
        return tuple(_plain(part) for part in value)
    dumps(value)  # raises, naming the value
    return value
