"""The losses of one batch as pure functions of the parameters: what every derivative here starts from."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from hydragrad.errors import UnsupportedError, message
from hydragrad.problem import Problem

_HARMLESS = (
    "There is a performance drop because we have not yet implemented the batching rule",  # vmap loops; we measure that
    "TF32 acceleration on top of oneDNN",  # said by torch's own context manager that switches oneDNN off
)

Vectors = tuple[Tensor, ...]
"""One tensor a trainable parameter: a point ``[*shape]``, or a block of K vectors ``[K, *shape]``."""


@final
@dataclass(frozen=True)
class Point:
    """Where one micro-batch's objective J(w; eps) = sum_i c_i (1 + eps_i) loss_i(w) is differentiated.

    ``params`` w_t; ``rest``: frozen parameters and buffers; ``coefficients`` c and ``weights`` 1 + eps, each with the
    shape of the losses.
    """

    params: Vectors
    rest: dict[str, Tensor]
    batch: Any
    coefficients: Tensor
    weights: Tensor


@final
class _Losses(nn.Module):
    """The user's ``loss(model, batch)`` as a module, so that functional_call can swap the parameters below it."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


@final
class Objective:
    """Pure functions of ``(params, rest, batch)`` over a private copy of the model; ``names``: what ``params`` are."""

    def __init__(self, problem: Problem, module: nn.Module, names: Sequence[str]) -> None:
        self.problem = problem
        self.names = tuple(names)
        self.module = module
        self._losses = _Losses(module, problem.loss)
        self.fragile = any(isinstance(part, nn.RNNBase) for part in module.modules())
        self._weight_normed = any(type(part).__name__ == "_WeightNorm" for part in module.modules())
        self._modules = dict(module.named_modules())
        self._modes: Mapping[str, bool] | None = None
        self._shapes: dict[Any, torch.Size] = {}

    def follow_modes(self, modes: Mapping[str, bool]) -> None:
        """Put every submodule in the mode (training or evaluation) that the step was taken in."""
        if modes and modes is not self._modes:
            for name, part in self._modules.items():
                part.training = modes.get(name, part.training)
            self._modes = modes

    def loss_shape(self, params: Vectors, rest: dict[str, Tensor], batch: Any, examples: int) -> torch.Size:
        """The shape of the losses of a batch, found by running it once for every form of batch."""
        leaves, structure = pytree.tree_flatten(batch)
        key = (examples, structure, tuple(tuple(x.shape) if isinstance(x, Tensor) else None for x in leaves))
        if key not in self._shapes:
            losses = self.losses(params, rest, batch)
            self._shapes[key] = self.problem.checked(losses, examples).shape
        return self._shapes[key]

    def losses(self, params: Vectors, rest: dict[str, Tensor], batch: Any) -> Tensor:
        """Per-example losses, ``[b]`` or ``[b, L]``."""
        tensors = {f"model.{name}": value for name, value in (*zip(self.names, params, strict=True), *rest.items())}
        return torch.func.functional_call(self._losses, tensors, (batch,))

    def scalar(
        self, params: Vectors, rest: dict[str, Tensor], batch: Any, coefficients: Tensor, weights: Tensor
    ) -> Tensor:
        """J of the micro-batch."""
        return (coefficients * weights * self.losses(params, rest, batch)).sum()

    def outputs(self, params: Vectors, rest: dict[str, Tensor], batch: Any) -> tuple[Vectors, list[Any]]:
        """Float tensors among the outputs of every call of the model within the loss, and what restores the rest."""
        calls: list[Any] = []
        forward = self.module.forward

        def capture(*args: Any, **kwargs: Any) -> Any:
            calls.append(forward(*args, **kwargs))
            return calls[-1]

        with _forward_replaced(self.module, capture):
            self.losses(params, rest, batch)
        leaves, structure = pytree.tree_flatten(calls)
        floats = tuple(leaf for leaf in leaves if _differentiable(leaf))
        return floats, [structure, [None if _differentiable(leaf) else leaf for leaf in leaves]]

    def head(self, floats: Vectors, others: list[Any], params: Vectors, rest: dict[str, Tensor], batch: Any) -> Tensor:
        """The losses from given model outputs, the model itself not run."""
        structure, leaves = others
        given = iter(floats)
        calls = iter(pytree.tree_unflatten([next(given) if leaf is None else leaf for leaf in leaves], structure))
        with _forward_replaced(self.module, lambda *args, **kwargs: next(calls)):
            return self.losses(params, rest, batch)

    def check_split(self, point: Point) -> None:
        """Refuse a loss that uses the parameters beside the model's outputs: it has no Gauss-Newton matrix J^T H J."""
        params = tuple(p.detach().requires_grad_() for p in point.params)
        floats, others = self.outputs(point.params, point.rest, point.batch)
        losses = self.head(tuple(f.detach() for f in floats), others, params, point.rest, point.batch)
        direct: Sequence[Tensor | None] = [None]
        if losses.requires_grad:
            direct = torch.autograd.grad(losses.sum(), params, allow_unused=True)
        if not floats or any(g is not None and bool(g.any()) for g in direct):
            raise UnsupportedError(
                message(
                    "the loss has no Gauss-Newton form",
                    expected="loss(model, batch) that uses the parameters only through the outputs of model(...)",
                    got="a loss that calls submodules of the model, or uses its parameters, directly",
                    remedy="call the model itself in the loss, or choose method='exact'",
                )
            )

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Kernels that have the derivatives we need: unfused attention, unfused recurrent cells."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            for known in _HARMLESS:
                warnings.filterwarnings("ignore", message=known)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if self._weight_normed:
                stack.enter_context(_UnfusedWeightNorm())
            if self.fragile:  # oneDNN's and cuDNN's recurrent kernels have no second derivative
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield


@final
class _UnfusedWeightNorm(TorchFunctionMode):
    """g v / ||v|| in plain operations: the fused kernel's second derivative is wrong (seen with torch 2.13 on CPU)."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch._weight_norm:  # pyright: ignore[reportPrivateImportUsage]
            v, g, *given = args
            dim = given[0] if given else 0
            return v * (g / torch.norm_except_dim(v, 2, dim))
        return func(*args, **(kwargs or {}))


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Shadow ``forward`` on this one object (a private copy) for a while."""
    shadowed = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if shadowed is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = shadowed
