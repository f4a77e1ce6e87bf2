"""torch.optim's optimizers in plain formulas: the oracles' own, sharing no code with hydragrad.

A rule is `(w, g, slots, hyper, scalars) -> (w', slots', scalars')`, differentiable in w, g and slots; `slots` are the
state's tensors under torch.optim's names, `scalars` its numbers before the step. Slots that a rule does not use with
these hyperparameters stay as they are.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

Tensors = dict[str, Tensor]
Scalars = dict[str, float]


def safe_sqrt(x: Tensor) -> Tensor:
    """`sqrt(x)`, with derivative 0 where x <= 0: there `g` and the first moment are 0, and so is the limit."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


def _coupled(w: Tensor, g: Tensor, hyper: Mapping[str, Any]) -> Tensor:
    g = -g if hyper["maximize"] else g
    return g + hyper["weight_decay"] * w


def _sgd(w: Tensor, g: Tensor, slots: Tensors, hyper: Mapping[str, Any], scalars: Scalars):
    g, mu = _coupled(w, g, hyper), hyper["momentum"]
    if mu == 0:
        return w - hyper["lr"] * g, slots, scalars
    buffer = g if scalars["first"] else mu * slots["momentum_buffer"] + (1 - hyper["dampening"]) * g
    direction = g + mu * buffer if hyper["nesterov"] else buffer
    return w - hyper["lr"] * direction, {"momentum_buffer": buffer}, {"first": 0.0}


def _adam(w: Tensor, g: Tensor, slots: Tensors, hyper: Mapping[str, Any], scalars: Scalars):
    t, lr, (beta1, beta2) = scalars["step"] + 1, hyper["lr"], hyper["betas"]
    if hyper["decoupled_weight_decay"]:
        g, w = -g if hyper["maximize"] else g, w * (1 - lr * hyper["weight_decay"])
    else:
        g = _coupled(w, g, hyper)
    new = {**slots, "exp_avg": beta1 * slots["exp_avg"] + (1 - beta1) * g}
    second = new["exp_avg_sq"] = beta2 * slots["exp_avg_sq"] + (1 - beta2) * g * g
    if hyper["amsgrad"]:
        second = new["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], second)
    mean = new["exp_avg"] / (1 - beta1**t)
    return w - lr * mean / (safe_sqrt(second) / (1 - beta2**t) ** 0.5 + hyper["eps"]), new, {"step": t}


def _rmsprop(w: Tensor, g: Tensor, slots: Tensors, hyper: Mapping[str, Any], scalars: Scalars):
    g, alpha = _coupled(w, g, hyper), hyper["alpha"]
    second = alpha * slots["square_avg"] + (1 - alpha) * g * g
    new = {**slots, "square_avg": second}
    if hyper["centered"]:
        new["grad_avg"] = alpha * slots["grad_avg"] + (1 - alpha) * g
        second = second - new["grad_avg"] ** 2
    direction = g / (safe_sqrt(second) + hyper["eps"])
    if hyper["momentum"] > 0:
        direction = new["momentum_buffer"] = hyper["momentum"] * slots["momentum_buffer"] + direction
    return w - hyper["lr"] * direction, new, {"step": scalars["step"] + 1}


def _adagrad(w: Tensor, g: Tensor, slots: Tensors, hyper: Mapping[str, Any], scalars: Scalars):
    g, t = _coupled(w, g, hyper), scalars["step"]
    total = slots["sum"] + g * g
    lr = hyper["lr"] / (1 + t * hyper["lr_decay"])
    return w - lr * g / (safe_sqrt(total) + hyper["eps"]), {"sum": total}, {"step": t + 1}


def _nadam(w: Tensor, g: Tensor, slots: Tensors, hyper: Mapping[str, Any], scalars: Scalars):
    t, lr, (beta1, beta2) = scalars["step"] + 1, hyper["lr"], hyper["betas"]
    if hyper["decoupled_weight_decay"]:
        g, w = -g if hyper["maximize"] else g, w * (1 - lr * hyper["weight_decay"])
    else:
        g = _coupled(w, g, hyper)
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (s * hyper["momentum_decay"])) for s in (t, t + 1))
    product = (torch.tensor(scalars["mu_product"]) * mu).item()  # torch keeps it as a tensor of the default dtype
    mean = beta1 * slots["exp_avg"] + (1 - beta1) * g
    second = beta2 * slots["exp_avg_sq"] + (1 - beta2) * g * g
    looked_ahead = (1 - mu) / (1 - product) * g + mu_next / (1 - product * mu_next) * mean
    w = w - lr * looked_ahead / (safe_sqrt(second / (1 - beta2**t)) + hyper["eps"])
    return w, {"exp_avg": mean, "exp_avg_sq": second}, {"step": t, "mu_product": product}


RULES = {"SGD": _sgd, "Adam": _adam, "AdamW": _adam, "RMSprop": _rmsprop, "Adagrad": _adagrad, "NAdam": _nadam}


def full_hyper(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The param group that `torch.optim` makes of the hyperparameters given: its defaults filled in."""
    group = getattr(torch.optim, name)([nn.Parameter(torch.zeros(1))], **given).param_groups[0]
    return {key: value for key, value in group.items() if key != "params"}


def initial_state(name: str, w: Tensor, hyper: Mapping[str, Any]) -> tuple[Tensors, Scalars]:
    """Slots and scalars before the first step."""
    momentum = ["momentum_buffer"] if hyper.get("momentum") else []
    names = {
        "SGD": momentum,
        "RMSprop": ["square_avg"] + ["grad_avg"] * bool(hyper.get("centered")) + momentum,
        "Adagrad": ["sum"],
    }.get(name, ["exp_avg", "exp_avg_sq"] + ["max_exp_avg_sq"] * bool(hyper.get("amsgrad")))
    slots = {slot: torch.full_like(w, hyper["initial_accumulator_value"] if slot == "sum" else 0.0) for slot in names}
    scalars = {"SGD": {"first": 1.0}, "NAdam": {"step": 0.0, "mu_product": 1.0}}.get(name, {"step": 0.0})
    return slots, scalars
