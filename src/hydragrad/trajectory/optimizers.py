"""torch.optim optimizers: described while recording, built and restored for replay."""

import inspect
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.files import dumps
from hydragrad.trajectory.state import Hyper


def group_names(params: dict[str, Tensor], optimizer: Optimizer) -> list[list[str]]:
    """Names of the parameters of each group, in the optimizer's order."""
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
    """Each group's hyperparameters as plain values (a tensor learning rate becomes a float)."""
    if [len(group["params"]) for group in optimizer.param_groups] != [len(group) for group in names]:
        raise UnsupportedError(
            message(
                "the optimizer's param groups changed during the recording",
                expected=f"groups of {[len(group) for group in names]} parameters",
                got=f"{[len(group['params']) for group in optimizer.param_groups]}",
                remedy="record each phase of training as a run of its own",
            )
        )
    return tuple(
        {key: _plain(value) for key, value in group.items() if key not in ("params", "param_names")}
        for group in optimizer.param_groups
    )


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
        if groups == self._seen and [len(group["params"]) for group in groups] == self._sizes:
            return self._last
        found = hyperparameters(self._optimizer, self.names)
        if found != self._last:
            self._last = found
        held = [value for group in groups for key, value in group.items() if key not in ("params", "param_names")]
        fixed = all(value is None or isinstance(value, (bool, int, float, str, tuple)) for value in held)
        self._seen = [dict(group) for group in groups] if fixed else []
        return self._last


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, (tuple, list)):
        return tuple(_plain(part) for part in value)
    dumps(value)  # raises, naming the value
    return value


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
    return cls(
        [
            {"params": [params[name] for name in names], **hyper}
            for names, hyper in zip(described["groups"], groups, strict=True)
        ]
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
