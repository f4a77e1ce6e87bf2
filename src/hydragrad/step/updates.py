"""Optimizer steps as pure, elementwise maps, and their derivatives.

Every optimizer here maps, element by element, ``(w, s, g) -> (w', s')``: the parameter, its slots (momentum, moments),
the gradient. The Jacobian of an elementwise map is a small matrix of coefficients per element, found by one
forward-mode derivative per input, so an optimizer is nothing but its formula.
"""

import abc
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, final

import torch
from torch import Tensor

Slots = dict[str, Tensor]
Hyper = Mapping[str, Any]
Scalars = Mapping[str, float]
Coefficient = float | Tensor


@final
@dataclass(frozen=True)
class Linearization:
    """The derivative of one update at one point: coefficients by (output, input), elementwise.

    Inputs are ``"w"``, the slots and ``"g"``; outputs ``"w"`` and the slots. An absent pair is zero.
    Slots that are given beyond ``slots`` are those of other steps (momentum switched off for this one): torch leaves
    them alone, and their derivatives pass unchanged. Blocks have a leading axis: ``[K, *shape]``.
    """

    slots: tuple[str, ...]
    coefficients: Mapping[tuple[str, str], Coefficient]

    def vjp(self, lam: Tensor, sig: Slots) -> tuple[Tensor, Slots, Tensor]:
        """Pull ``(lam, sig)`` = d m / d(w', s') back to ``(lam~, sig_t, gam)`` = d m / d(w, s, g)."""
        outputs = {"w": lam, **{slot: sig[slot] for slot in self.slots}}
        pulled = {
            source: _combine(
                [(self.coefficients.get((target, source), 0.0), outputs[target]) for target in outputs], lam
            )
            for source in ("w", *self.slots, "g")
        }
        return pulled["w"], {**sig, **{slot: pulled[slot] for slot in self.slots}}, pulled["g"]

    def vjp_into(self, lam: Tensor, sig: Slots, gam: Tensor) -> None:
        """``vjp`` in place: ``lam``, ``sig`` become ``lam~``, ``sig_t`` and ``gam`` is overwritten with d m/d g.

        Blocks are large, and what bounds a sweep is passes over memory: with numbers for coefficients (SGD) nothing
        is allocated.
        """
        numbers = self._numbers
        if numbers is None or len(self.slots) > 1:
            new_lam, new_sig, new_gam = self.vjp(lam, sig)
            lam.copy_(new_lam)
            gam.copy_(new_gam)
            for slot in self.slots:
                sig[slot].copy_(new_sig[slot])
            return
        if not self.slots:
            torch.mul(lam, numbers["w", "g"], out=gam)
            _scale_(lam, numbers["w", "w"])
            return
        (slot,) = self.slots
        s = sig[slot]
        if self._heavy_ball:
            torch.add(s, lam, alpha=numbers["w", "g"], out=gam)  # the momentum saw what the gradient saw
            torch.mul(gam, numbers[slot, slot], out=s)
            return
        torch.mul(lam, numbers["w", "g"], out=gam)
        gam.add_(s, alpha=numbers[slot, "g"])
        into_w = s * numbers[slot, "w"] if numbers[slot, "w"] else None
        _scale_(s, numbers[slot, slot])
        s.add_(lam, alpha=numbers["w", slot])
        _scale_(lam, numbers["w", "w"])
        if into_w is not None:
            lam.add_(into_w)

    @cached_property
    def _numbers(self) -> dict[tuple[str, str], float] | None:
        """The coefficients, if all are numbers."""
        numbers = {pair: c for pair, c in self.coefficients.items() if isinstance(c, float)}
        return numbers if len(numbers) == len(self.coefficients) else None

    @cached_property
    def _heavy_ball(self) -> bool:
        """SGD with undampened momentum and nothing else: s' = a s + g, w' = w - lr s'."""
        numbers, (slot,) = self._numbers, self.slots
        assert numbers is not None
        plain = numbers["w", "w"] == 1.0 and not numbers[slot, "w"] and numbers[slot, "g"] == 1.0
        return plain and _close(numbers["w", slot], numbers[slot, slot] * numbers["w", "g"])

    def pull_numbers(self, lam: float, sig: Mapping[str, float]) -> tuple[float, dict[str, float], float]:
        """``vjp`` of numbers, where the coefficients are numbers too (a linear update)."""
        outputs = {"w": lam, **sig}
        pulled = dict.fromkeys(("w", *self.slots, "g"), 0.0)
        for (target, source), coefficient in self.coefficients.items():
            assert isinstance(coefficient, float)
            pulled[source] += coefficient * outputs[target]
        return pulled["w"], {**sig, **{slot: pulled[slot] for slot in self.slots}}, pulled["g"]

    def jvp(self, dw: Tensor, ds: Slots, dg: Tensor) -> tuple[Tensor, Slots]:
        """Push tangents ``(dw, ds, dg)`` of ``(w, s, g)`` forward to ``(dw', ds')``."""
        inputs = {"w": dw, **{slot: ds[slot] for slot in self.slots}, "g": dg}
        pushed = {
            target: _combine([(self.coefficients.get((target, source), 0.0), inputs[source]) for source in inputs], dw)
            for target in ("w", *self.slots)
        }
        return pushed["w"], {**ds, **{slot: pushed[slot] for slot in self.slots}}


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-14)


def _scale_(x: Tensor, factor: float) -> None:
    if factor != 1.0:
        x.mul_(factor)


def _combine(terms: list[tuple[Coefficient, Tensor]], like: Tensor) -> Tensor:
    """Sum of coefficient * block, in as few passes over memory as the coefficients allow."""
    total: Tensor | None = None
    for coefficient, block in terms:
        if isinstance(coefficient, Tensor):
            total = block * coefficient if total is None else total.addcmul_(block, coefficient)
        elif coefficient:
            total = block * coefficient if total is None else total.add_(block, alpha=coefficient)
    return torch.zeros_like(like) if total is None else total


class Update(abc.ABC):
    """One optimizer's step as a pure function; subclasses give the formula, derivatives follow.

    ``linear``: the formula is linear in (w, s, g), so its coefficients are numbers, the same for every element.
    """

    linear: ClassVar[bool] = False

    @abc.abstractmethod
    def slots(self, hyper: Hyper) -> tuple[str, ...]:
        """Names of the differentiable state tensors, as in torch.optim, for these hyperparameters."""

    @abc.abstractmethod
    def step(self, w: Tensor, slots: Slots, g: Tensor, hyper: Hyper, scalars: Scalars) -> tuple[Tensor, Slots]:
        """``(w', s')``; ``hyper`` is the param group, ``scalars`` the non-differentiable state before the step."""

    def scalars(self, torch_state: Mapping[str, Tensor]) -> dict[str, float]:
        """The non-differentiable state of one parameter, from torch.optim's of it (empty before its first step)."""
        return {"step": float(torch_state["step"]) if "step" in torch_state else 0.0}

    def initial(self, hyper: Hyper) -> dict[str, float]:
        """Value of each slot before the first step, where torch.optim has not made it yet."""
        return dict.fromkeys(self.slots(hyper), 0.0)

    @final
    def read(self, w: Tensor, torch_state: Mapping[str, Tensor], hyper: Hyper) -> Slots:
        """The slots of one parameter out of torch.optim's state of it."""
        return {
            slot: torch_state[slot] if slot in torch_state else torch.full_like(w, value)
            for slot, value in self.initial(hyper).items()
        }

    @final
    def linearize(self, w: Tensor, slots: Slots, g: Tensor, hyper: Hyper, scalars: Scalars) -> Linearization:
        """The derivative of ``step`` at this point."""
        names = self.slots(hyper)
        if self.linear:
            return _linear(self, hyper, scalars)
        with torch.enable_grad():
            point = {"w": w, **slots, "g": g}
            leaves = {source: x.detach().requires_grad_() for source, x in point.items()}
            held = {slot: leaves[slot] for slot in names}
            new_w, new_slots = self.step(leaves["w"], held, leaves["g"], hyper, scalars)
            coefficients: dict[tuple[str, str], Coefficient] = {}
            for target, value in (("w", new_w), *new_slots.items()):
                # elementwise: the gradient of the sum is the diagonal of the Jacobian
                row = torch.autograd.grad(value.sum(), list(leaves.values()), retain_graph=True, allow_unused=True)
                pairs = zip(leaves, row, strict=True)
                coefficients.update({(target, source): c for source, c in pairs if c is not None})
        return Linearization(names, coefficients)


def _linear(update: Update, hyper: Hyper, scalars: Scalars) -> Linearization:
    """Coefficients of a linear update, as numbers: its values at unit inputs."""
    names = update.slots(hyper)
    sources = ("w", *names, "g")
    coefficients: dict[tuple[str, str], Coefficient] = {}
    for chosen in sources:
        unit = {source: torch.tensor(float(source == chosen), dtype=torch.float64) for source in sources}
        new_w, new_slots = update.step(unit["w"], {slot: unit[slot] for slot in names}, unit["g"], hyper, scalars)
        coefficients.update({(target, chosen): float(value) for target, value in (("w", new_w), *new_slots.items())})
    return Linearization(names, coefficients)


def safe_sqrt(x: Tensor) -> Tensor:
    """sqrt(x) with derivative 0 at x = 0, where torch's is infinite and makes 0 * inf = NaN.

    At a zero second moment the first moment is zero too, and the derivative of m / (sqrt(v) + eps) is dm / eps:
    the square root contributes nothing in the limit.
    """
    positive = x != 0
    return torch.where(positive, torch.where(positive, x, torch.ones_like(x)).sqrt(), torch.zeros_like(x))


@final
class SGD(Update):
    """torch.optim.SGD: momentum, dampening, Nesterov, weight decay, maximize."""

    linear = True

    def slots(self, hyper: Hyper) -> tuple[str, ...]:
        return ("momentum_buffer",) if hyper["momentum"] else ()

    def scalars(self, torch_state: Mapping[str, Tensor]) -> dict[str, float]:
        return {"first": 0.0 if "momentum_buffer" in torch_state else 1.0}

    def step(self, w: Tensor, slots: Slots, g: Tensor, hyper: Hyper, scalars: Scalars) -> tuple[Tensor, Slots]:
        g = (-g if hyper["maximize"] else g) + float(hyper["weight_decay"]) * w
        momentum, lr = float(hyper["momentum"]), float(hyper["lr"])
        if not momentum:
            return w - lr * g, {}
        old = slots["momentum_buffer"]
        # torch starts the buffer at the first gradient itself, undampened
        buffer = g + 0.0 * old if scalars["first"] else momentum * old + (1 - float(hyper["dampening"])) * g
        return w - lr * (g + momentum * buffer if hyper["nesterov"] else buffer), {"momentum_buffer": buffer}
