"""The adaptive optimizers of torch.optim as pure updates."""

from collections.abc import Mapping
from typing import final

import torch
from torch import Tensor

from hydragrad.step.known import register
from hydragrad.step.updates import Hyper, Scalars, Slots, Update, safe_sqrt


def _decayed(w: Tensor, g: Tensor, hyper: Hyper, *, decoupled: bool) -> tuple[Tensor, Tensor]:
    """Sign and weight decay, which every optimizer of torch treats alike: coupled into g, or taken off w."""
    decay = float(hyper["weight_decay"])
    g = -g if hyper.get("maximize") else g
    return (w * (1 - float(hyper["lr"]) * decay), g) if decoupled else (w, g + decay * w)


def _moments(slots: Slots, g: Tensor, hyper: Hyper) -> tuple[Tensor, Tensor, float, float]:
    beta1, beta2 = (float(beta) for beta in hyper["betas"])
    first = beta1 * slots["exp_avg"] + (1 - beta1) * g
    second = beta2 * slots["exp_avg_sq"] + (1 - beta2) * g * g
    return first, second, beta1, beta2


@final
class Adam(Update):
    """torch.optim.Adam and AdamW, with amsgrad."""

    def __init__(self, *, decoupled: bool) -> None:
        self.decoupled = decoupled

    def slots(self, hyper: Hyper) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if hyper["amsgrad"] else ()))

    def step(self, w: Tensor, slots: Slots, g: Tensor, hyper: Hyper, scalars: Scalars) -> tuple[Tensor, Slots]:
        w, g = _decayed(w, g, hyper, decoupled=self.decoupled or bool(hyper.get("decoupled_weight_decay")))
        first, second, beta1, beta2 = _moments(slots, g, hyper)
        new = {"exp_avg": first, "exp_avg_sq": second}
        if hyper["amsgrad"]:
            new["max_exp_avg_sq"] = torch.maximum(slots["max_exp_avg_sq"], second)
        count = scalars["step"] + 1
        denominator = safe_sqrt(new.get("max_exp_avg_sq", second)) / (1 - beta2**count) ** 0.5 + float(hyper["eps"])
        return w - float(hyper["lr"]) / (1 - beta1**count) * first / denominator, new


@final
class NAdam(Update):
    """torch.optim.NAdam, coupled and decoupled weight decay."""

    def slots(self, hyper: Hyper) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq")

    def scalars(self, torch_state: Mapping[str, Tensor]) -> dict[str, float]:
        product = torch_state.get("mu_product", torch.ones(()))  # torch starts it so, in the default dtype
        single = float(product.dtype == torch.float32)
        return {**super().scalars(torch_state), "mu_product": float(product), "single": single}

    def step(self, w: Tensor, slots: Slots, g: Tensor, hyper: Hyper, scalars: Scalars) -> tuple[Tensor, Slots]:
        w, g = _decayed(w, g, hyper, decoupled=bool(hyper.get("decoupled_weight_decay")))
        first, second, beta1, beta2 = _moments(slots, g, hyper)
        count, lr, decay = scalars["step"] + 1, float(hyper["lr"]), float(hyper["momentum_decay"])
        mu = beta1 * (1 - 0.5 * 0.96 ** (count * decay))
        mu_next = beta1 * (1 - 0.5 * 0.96 ** ((count + 1) * decay))
        # torch keeps this product in a tensor of the default dtype, whatever the parameters are: round as it does
        kept = torch.tensor(scalars["mu_product"], dtype=torch.float32 if scalars.get("single") else torch.float64)
        product = float(kept * mu)
        denominator = safe_sqrt(second / (1 - beta2**count)) + float(hyper["eps"])
        w = w - lr * (1 - mu) / (1 - product) * g / denominator
        w = w - lr * mu_next / (1 - product * mu_next) * first / denominator
        return w, {"exp_avg": first, "exp_avg_sq": second}


@final
class RMSprop(Update):
    """torch.optim.RMSprop, centered and with momentum."""

    def slots(self, hyper: Hyper) -> tuple[str, ...]:
        momentum = ("momentum_buffer",) if hyper["momentum"] else ()
        return ("square_avg", *momentum, *(("grad_avg",) if hyper["centered"] else ()))

    def step(self, w: Tensor, slots: Slots, g: Tensor, hyper: Hyper, scalars: Scalars) -> tuple[Tensor, Slots]:
        w, g = _decayed(w, g, hyper, decoupled=False)
        alpha, lr = float(hyper["alpha"]), float(hyper["lr"])
        square = alpha * slots["square_avg"] + (1 - alpha) * g * g
        new, variance = {"square_avg": square}, square
        if hyper["centered"]:
            new["grad_avg"] = alpha * slots["grad_avg"] + (1 - alpha) * g
            variance = square - new["grad_avg"] * new["grad_avg"]
        direction = g / (safe_sqrt(variance) + float(hyper["eps"]))
        if hyper["momentum"]:
            direction = new["momentum_buffer"] = float(hyper["momentum"]) * slots["momentum_buffer"] + direction
        return w - lr * direction, new


@final
class Adagrad(Update):
    """torch.optim.Adagrad, with learning-rate decay and initial accumulator."""

    def slots(self, hyper: Hyper) -> tuple[str, ...]:
        return ("sum",)

    def initial(self, hyper: Hyper) -> dict[str, float]:
        return {"sum": float(hyper["initial_accumulator_value"])}

    def step(self, w: Tensor, slots: Slots, g: Tensor, hyper: Hyper, scalars: Scalars) -> tuple[Tensor, Slots]:
        w, g = _decayed(w, g, hyper, decoupled=False)
        total = slots["sum"] + g * g
        rate = float(hyper["lr"]) / (1 + scalars["step"] * float(hyper["lr_decay"]))
        return w - rate * g / (safe_sqrt(total) + float(hyper["eps"])), {"sum": total}


register("Adam", Adam(decoupled=False))
register("AdamW", Adam(decoupled=True))
register("NAdam", NAdam())
register("RMSprop", RMSprop())
register("Adagrad", Adagrad())
