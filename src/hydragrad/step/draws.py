"""The random numbers of one forward pass: drawn once as the training step drew them, then handed out as constants."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hydragrad.errors import UnsupportedError, message

_DROPOUT = ("native_dropout", "_fused_dropout")
_NOISY = ("rrelu_with_noise", "rrelu_with_noise_", "rrelu_with_noise_functional")
_PLAIN = (
    *("bernoulli", "binomial", "poisson", "multinomial", "normal", "uniform", "exponential", "cauchy", "geometric"),
    *("log_normal", "random", "rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "randperm"),
    *("_standard_gamma", "_sample_dirichlet"),
)
_DRAWING = {*_DROPOUT, *_NOISY, *_PLAIN, *(f"{name}_" for name in _PLAIN)}
"""Operations whose random part is one tensor. Others with torch's random tag are fused (attention, recurrent cells)."""


@final
class Capture(TorchDispatchMode):
    """While it lasts, random numbers are drawn as ever and noted: ``draws``, one tensor an operation, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if torch.Tag.nondeterministic_seeded in func.tags:
            name = _name(func)
            if name in _DRAWING:
                self.draws.append(_random_part(name, func, args, out).detach().clone())
        return out


@final
class HandOut(TorchDispatchMode):
    """While it lasts, operations that draw receive ``draws`` in order, whatever they would have drawn.

    So the noise is a constant of every derivative, an input of traced graphs, and one for all queries of a block.
    Raises UnsupportedError where the forward pass asks for more, fewer or other numbers than were captured.
    ``position``: how many were handed out.
    """

    def __init__(self, draws: Sequence[Tensor]) -> None:
        super().__init__()
        self.draws = draws
        self.position = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded not in func.tags or (name := _name(func)) not in _DRAWING:
            return func(*args, **(kwargs or {}))
        if self.position == len(self.draws):
            raise UnsupportedError(_differ(f"{len(self.draws)} draws", f"one more, by {func}"))
        draw = self.draws[self.position]
        self.position += 1
        return _given(name, func, args, kwargs or {}, draw)

    def finish(self) -> None:
        """Refuse draws that were left over."""
        if self.position != len(self.draws):
            raise UnsupportedError(_differ(f"{len(self.draws)} draws", f"{self.position}"))


def captured(work: Callable[[], Any]) -> tuple[Any, tuple[Tensor, ...]]:
    """The result of ``work`` and the random tensors it drew."""
    with Capture() as capture:
        result = work()
    return result, tuple(capture.draws)


def _name(func: Any) -> str:
    return func.overloadpacket.__name__


def _random_part(name: str, func: Any, args: tuple[Any, ...], out: Any) -> Tensor:
    if name in _DROPOUT:
        return out[1]  # the mask
    if name in _NOISY:
        return out[1] if name == "rrelu_with_noise_functional" else args[1]  # the slopes
    if name == "normal" and any(isinstance(x, Tensor) for x in args):
        raise UnsupportedError(
            message(
                "torch.normal with a tensor of means or deviations inside the step",
                expected="random numbers that do not depend on the parameters",
                cause="autograd takes the sample for a constant, though it moves with its mean",
                remedy="write mean + std * torch.randn_like(mean)",
            )
        )
    return args[0] if func._schema.is_mutable else out


def _given(name: str, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], draw: Tensor) -> Any:
    """The result of the operation, had it drawn ``draw``."""
    if name in _DROPOUT:
        x, p = args[0], float(args[1])
        _check_shape(func, x, draw)
        keep = p if name == "_fused_dropout" else 1 - p
        return x * draw.to(x.dtype) * (1 / keep if keep else 0.0), draw.clone()
    if name in _NOISY:
        x, noise = args[:2]
        _check_shape(func, x, draw)
        if name == "rrelu_with_noise_functional":
            return x * draw, draw.clone()
        noise.copy_(draw)
        return x.mul_(draw) if name.endswith("_") else x * draw
    if func._schema.is_mutable:
        _check_shape(func, args[0], draw)
        return args[0].copy_(draw)
    like = args[0] if args and isinstance(args[0], Tensor) and name != "multinomial" else None
    if like is not None:
        _check_shape(func, like, draw)
    elif args and isinstance(args[0], (list, tuple)) and tuple(args[0]) != tuple(draw.shape):
        raise UnsupportedError(_differ(tuple(draw.shape), f"{tuple(args[0])} asked by {func}"))
    dtype = kwargs.get("dtype") or (draw.dtype if like is None else like.dtype)
    return draw.to(dtype, copy=True)  # a copy: dropout divides its mask in place


def _check_shape(func: Any, asked: Tensor, draw: Tensor) -> None:
    if asked.shape != draw.shape:
        raise UnsupportedError(_differ(tuple(draw.shape), f"{tuple(asked.shape)} asked by {func}"))


def _differ(expected: object, got: object) -> str:
    return message(
        "a forward pass draws other random numbers than the one before it, from the same state",
        expected=expected,
        got=got,
        cause="a model or loss that draws differently from call to call (layers skipped at random, a recomputed part)",
        remedy="report it with the model's code; meanwhile train without that part",
    )
