"""Which optimizers are known: the class that a replay runs, and its step as a pure update.

A run names its optimizer's class. Nothing is ever looked up by such a name but the classes of torch.optim and those
that were registered in this process.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from hydragrad.errors import UnsupportedError, message
from hydragrad.step.updates import SGD, Update

_PAGE = "see docs/optimizers.md"

_OF_TORCH: dict[str, Update] = {"SGD": SGD()}
_OWN: dict[str, tuple[type[Optimizer], Update]] = {}


def register(optimizer: type[Optimizer] | str, update: Update) -> None:
    """Make an optimizer known: its class (for one of torch.optim the name will do), and its step as a pure update.

    Registered again, the last update counts. Call it where the run is recorded and where it is loaded: code is not
    recorded. The update is compared with the optimizer's own steps before a run is differentiated by it.

    Example: ``hydragrad.step.register(Lion, LionUpdate())``.
    """
    cls = getattr(torch.optim, optimizer, None) if isinstance(optimizer, str) else optimizer
    if not isinstance(cls, type) or not issubclass(cls, Optimizer) or not isinstance(update, Update):
        raise UnsupportedError(
            message(
                "this cannot be registered as an optimizer",
                expected="an optimizer's class, and an object of a subclass of hydragrad.step.Update",
                got=f"{optimizer!r} and {update!r}",
                remedy=f"register(Lion, LionUpdate()); {_PAGE}",
            )
        )
    if class_of_torch(description(cls)) is cls:
        _OF_TORCH[cls.__name__] = update
    else:
        _OWN[cls.__name__] = (cls, update)


def description(cls: type[Optimizer]) -> dict[str, str]:
    """How a run names the class of its optimizer."""
    return {"class": cls.__name__, "module": cls.__module__}


def class_of_torch(described: Mapping[str, Any]) -> type[Any] | None:
    """The recorded class if it is one of torch.optim's optimizers."""
    cls = getattr(torch.optim, described["class"], None)
    if described["module"].split(".")[:2] != ["torch", "optim"] or not isinstance(cls, type):
        return None
    return cls if issubclass(cls, Optimizer) and cls is not Optimizer else None


def class_of(described: Mapping[str, Any]) -> type[Any] | None:
    """The recorded class, of torch.optim or registered.

    By its name alone: what was ``__main__.Lion`` while a script recorded is ``train.Lion`` where another imports it.
    """
    if described["module"].split(".")[:2] == ["torch", "optim"]:
        return class_of_torch(described)
    return _OWN[described["class"]][0] if described["class"] in _OWN else None


def supported() -> tuple[str, ...]:
    """Names of the optimizer classes that can be differentiated."""
    return tuple(sorted({*_OF_TORCH, *_OWN}))


def update_of(described: Mapping[str, Any]) -> Update:
    """The pure update of the recorded class."""
    name = described["class"]
    return _OWN[name][1] if class_of_torch(described) is None and name in _OWN else update_for(name)


def update_for(name: str) -> Update:
    """The pure update of the optimizer class ``name`` of torch.optim."""
    if name not in _OF_TORCH:
        raise UnsupportedError(not_known(f"the optimizer {name} cannot be differentiated yet", name))
    return _OF_TORCH[name]


def ships(described: Mapping[str, Any]) -> bool:
    """Whether class and update are torch's and hydragrad's own, whose agreement hydragrad's tests have shown."""
    return class_of_torch(described) is not None and type(update_of(described)).__module__.startswith("hydragrad.")


def not_known(summary: str, name: str, *, cause: str = "", otherwise: str = "") -> str:
    """A refusal's message: which optimizers are supported and how ``name`` becomes one of them."""
    return message(
        summary,
        expected=f"one of {', '.join(supported())}",
        got=name,
        cause=cause,
        remedy=(
            f"train with a supported optimizer, or write the formula of {name} as a subclass of hydragrad.step.Update "
            f"and pass both to hydragrad.step.register before recording and before loading ({_PAGE}){otherwise}"
        ),
    )
