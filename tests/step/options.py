"""Every optimizer with every combination of options that changes its formula: (name, hyperparameters), and its id."""

from itertools import product
from typing import Any


def _sgd() -> list[dict[str, Any]]:
    plain = [{"lr": 0.1, "weight_decay": wd, "maximize": m} for wd, m in product((0, 0.05), (False, True))]
    heavy = [
        {"lr": 0.05, "momentum": 0.9, "dampening": d, "weight_decay": wd, "maximize": m}
        for d, wd, m in product((0, 0.3), (0, 0.05), (False, True))
    ]
    nesterov = [
        {"lr": 0.05, "momentum": 0.8, "nesterov": True, "weight_decay": wd, "maximize": m}
        for wd, m in product((0, 0.05), (False, True))
    ]
    return plain + heavy + nesterov


def _adam() -> list[dict[str, Any]]:
    return [
        {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": wd, "amsgrad": a, "maximize": m}
        for wd, a, m in product((0, 0.1), (False, True), (False, True))
    ]


def _rmsprop() -> list[dict[str, Any]]:
    return [
        {"lr": 0.01, "alpha": 0.9, "centered": c, "momentum": mu, "weight_decay": wd, "maximize": m}
        for c, mu, wd, m in product((False, True), (0, 0.7), (0, 0.1), (False, True))
    ]


def _adagrad() -> list[dict[str, Any]]:
    return [
        {"lr": 0.05, "lr_decay": d, "initial_accumulator_value": a, "weight_decay": wd, "maximize": m}
        for d, a, wd, m in product((0, 0.1), (0, 0.2), (0, 0.1), (False, True))
    ]


def _nadam() -> list[dict[str, Any]]:
    return [
        {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": wd, "decoupled_weight_decay": d, "maximize": m}
        for wd, d, m in product((0, 0.1), (False, True), (False, True))
    ]


_ALL = {
    "SGD": _sgd(),
    "Adam": _adam(),
    "AdamW": _adam(),
    "RMSprop": _rmsprop(),
    "Adagrad": _adagrad(),
    "NAdam": _nadam(),
}
_ALL["Adam"].append({"lr": 0.01, "decoupled_weight_decay": True, "weight_decay": 0.1})
_ALL["NAdam"].append({"lr": 0.01, "momentum_decay": 0.05})

OPTIONS = [(name, hyper) for name, many in _ALL.items() for hyper in many]


def option_id(option: tuple[str, dict[str, Any]]) -> str:
    """`Adam-weight_decay=0.1-amsgrad`: the name and whatever is switched on."""
    name, hyper = option
    shown = [k if v is True else f"{k}={v}" for k, v in hyper.items() if v and k not in ("lr", "betas", "alpha")]
    return "-".join([name, *shown])


# One or two of each, with everything on that can be on together: for the slow tests of whole runs.
CHOSEN = [
    ("SGD", {"lr": 0.2}),
    ("SGD", {"lr": 0.1, "momentum": 0.9}),
    ("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.05}),
    ("SGD", {"lr": 0.1, "momentum": 0.8, "nesterov": True, "weight_decay": 0.05}),
    ("SGD", {"lr": 0.02, "momentum": 0.5, "maximize": True}),
    ("Adam", {"lr": 0.02}),
    ("Adam", {"lr": 0.02, "betas": (0.8, 0.95), "weight_decay": 0.1}),
    ("Adam", {"lr": 0.02, "betas": (0.8, 0.7), "amsgrad": True}),
    ("AdamW", {"lr": 0.02, "weight_decay": 0.1}),
    ("AdamW", {"lr": 0.02, "betas": (0.8, 0.7), "weight_decay": 0.1, "amsgrad": True, "maximize": True}),
    ("RMSprop", {"lr": 0.01}),
    ("RMSprop", {"lr": 0.005, "alpha": 0.8, "centered": True, "momentum": 0.5, "weight_decay": 0.1}),
    ("Adagrad", {"lr": 0.05}),
    ("Adagrad", {"lr": 0.05, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "weight_decay": 0.1}),
    ("NAdam", {"lr": 0.02}),
    ("NAdam", {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True}),
]
