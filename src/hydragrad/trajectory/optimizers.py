"""Optimizers: those that are known, built and restored for replay."""

import inspect
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hydragrad.errors import UnsupportedError, message
from hydragrad.step.known import class_of, class_of_torch, description, not_known, supported
from hydragrad.trajectory.hyper import as_held, check_optimizer
from hydragrad.trajectory.state import Hyper


def check_known(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose run nobody could load; warn of one whose run can be replayed, and nothing more."""
    check_optimizer(optimizer)
    cls = type(optimizer)
    if class_of(description(cls)) is not cls:
        base = next((parent.__name__ for parent in cls.__mro__ if parent.__name__ in supported()), None)
        raise UnsupportedError(
            not_known(
                f"the optimizer {cls.__module__}.{cls.__name__} is not known to hydragrad",
                cls.__name__,
                cause="an optimizer of your own or of another package: its run could be neither replayed nor "
                "differentiated",
                otherwise=f"; if it takes the very steps of {base}: hydragrad.step.register({cls.__name__}, "
                f"hydragrad.step.update_for({base!r}))"
                if base
                else "",
            )
        )
    if cls.__name__ not in supported():
        told = f"a run of {cls.__name__} is recorded and replayed, but cannot be differentiated yet"
        warnings.warn(not_known(told, cls.__name__), stacklevel=4)


def build_optimizer(described: dict[str, Any], groups: tuple[Hyper, ...], params: Mapping[str, Tensor]) -> Optimizer:
    """The recorded class over ``params``, with the recorded groups, order and hyperparameters."""
    cls = class_of(described)
    if cls is None:
        raise UnsupportedError(
            not_known(
                f"the run was recorded with the optimizer {described['module']}.{described['class']}",
                described["class"],
                cause="an optimizer of your own or of another package, not registered in this process: replay runs the "
                "very class that was recorded, and code is not recorded",
            )
        )
    device = next((param.device for param in params.values()), torch.device("cpu"))
    held = [
        {"params": [params[name] for name in names], **as_held(hyper, device)}
        for names, hyper in zip(described["groups"], groups, strict=True)
    ]
    if class_of_torch(described) is not None:
        return cls(held)
    try:
        return cls(held, **_arguments(cls, groups))
    except Exception as error:  # a constructor of the user's may fail in any way
        raise UnsupportedError(
            message(
                f"the optimizer {cls.__name__} cannot be made again from its param groups",
                expected="a constructor that takes param groups, and whose other arguments are hyperparameters in them",
                got=f"{type(error).__name__}: {error}",
                remedy="hand every argument on: super().__init__(params, dict(lr=lr, ...)); see docs/optimizers.md",
            )
        ) from error


def _arguments(cls: type[Any], groups: tuple[Hyper, ...]) -> dict[str, Any]:
    """What the constructor asks for by name, as the first group has it: an ``lr`` without a default must be given."""
    names = list(inspect.signature(cls).parameters)[1:]
    return {name: groups[0][name] for name in names if groups and name in groups[0]}


def rewrites_gradients(optimizer: Optimizer) -> bool:
    """Whether a step may write into the gradients: SGD's foreach kernel adds Nesterov's momentum to them in place.

    Weight decay and ``maximize`` make a copy first; torch's other updates leave the gradients alone. Of an optimizer of
    the user's own nobody knows.
    """
    if class_of_torch(description(type(optimizer))) is None:
        return True
    return any(
        group.get("nesterov") and group.get("foreach") is not False and not (group["weight_decay"] or group["maximize"])
        for group in optimizer.param_groups
    )


def misfit(cls: type[Any], hyper: Hyper) -> str | None:
    """The hyperparameter whose value is of no kind that the optimizer takes (a word for a number), if there is one."""
    known = inspect.signature(cls.__init__).parameters
    return next((key for key, value in hyper.items() if key in known and not _alike(value, known[key].default)), None)


def _alike(value: Any, default: Any) -> bool:
    if isinstance(default, tuple):
        return isinstance(value, tuple) and len(value) == len(default) and all(_alike(part, None) for part in value)
    if isinstance(default, str):
        return isinstance(value, str)
    if isinstance(default, bool) or default is None or default is inspect.Parameter.empty:
        return value is None or isinstance(value, (bool, int, float, str if default is None else bool))
    return isinstance(value, (int, float))


def restore_optimizer(
    optimizer: Optimizer, slots: Mapping[str, Mapping[str, Tensor]], params: Mapping[str, Tensor]
) -> None:
    """Give the optimizer the recorded state, as clones on the devices on which torch.optim keeps them."""
    on_device = {
        id(param): bool(group.get("capturable") or group.get("fused"))
        for group in optimizer.param_groups
        for param in group["params"]
    }
    optimizer.state.clear()
    for name, held in slots.items():
        param = params[name]
        optimizer.state[param] = {
            slot: value.clone()
            if slot in ("step", "mu_product") and not on_device.get(id(param), False)
            else _like(param, value)
            for slot, value in held.items()
        }


def _like(param: Tensor, value: Tensor) -> Tensor:
    """A copy on the parameter's device, in its memory layout if it has its shape."""
    if value.shape != param.shape or param.is_contiguous():
        return value.to(param.device, copy=True)
    return torch.empty_like(param, dtype=value.dtype, requires_grad=False).copy_(value)
