"""torch.optim optimizers: built and restored for replay."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from hydragrad.errors import UnsupportedError, message
from hydragrad.trajectory.hyper import as_held
from hydragrad.trajectory.state import Hyper


def build_optimizer(described: dict[str, Any], groups: tuple[Hyper, ...], params: Mapping[str, Tensor]) -> Optimizer:
    """The recorded torch.optim class over ``params``, with the recorded groups, order and hyperparameters."""
    cls = torch_optimizer(described)
    if cls is None:
        raise UnsupportedError(
            message(
                f"the run was recorded with the optimizer {described['module']}.{described['class']}",
                expected="a class of torch.optim",
                cause="a custom optimizer, or one of another package",
                remedy="train with an optimizer of torch.optim; replay runs the very class that was recorded",
            )
        )
    device = next((param.device for param in params.values()), torch.device("cpu"))
    return cls(
        [
            {"params": [params[name] for name in names], **as_held(hyper, device)}
            for names, hyper in zip(described["groups"], groups, strict=True)
        ]
    )


def rewrites_gradients(optimizer: Optimizer) -> bool:
    """Whether a step may write into the gradients: SGD's foreach kernel adds Nesterov's momentum to them in place.

    Weight decay and ``maximize`` make a copy first; every other update here leaves the gradients alone.
    """
    return any(
        group.get("nesterov") and group.get("foreach") is not False and not (group["weight_decay"] or group["maximize"])
        for group in optimizer.param_groups
    )


def torch_optimizer(described: dict[str, Any]) -> type[Any] | None:
    """The recorded class if it is one of torch.optim's optimizers; nothing else is ever looked up or called."""
    cls = getattr(torch.optim, described["class"], None)
    if described["module"].split(".")[:2] != ["torch", "optim"] or not isinstance(cls, type):
        return None
    return cls if issubclass(cls, Optimizer) and cls is not Optimizer else None


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
