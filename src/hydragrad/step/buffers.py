"""How a forward pass changes buffers, made differentiable: running statistics, and moving averages of the user's."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode


@final
class PureStatistics(TorchFunctionMode):
    """While it lasts, normalizations with running statistics leave those alone and hand out the new ones instead.

    torch's kernels have no derivative in the running statistics and update them in place, outside of autograd. Here
    they are functions: of the statistics in evaluation mode, and ``v' = (1 - a) v + a (batch's)`` in training mode,
    with the unbiased variance. ``after(v)``: what v became.
    """

    def __init__(self) -> None:
        super().__init__()
        self._updated: dict[int, tuple[Tensor, Tensor]] = {}  # the old one is kept: its id must stay its own

    def after(self, statistic: Tensor) -> Tensor:
        """The latest value of a running statistic, given as the tensor that the model holds."""
        known = self._updated.get(id(statistic))
        return statistic if known is None else known[1]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        form = _FORMS.get(func)
        if form is None:
            return func(*args, **(kwargs or {}))
        names, instance = form
        given = {**_DEFAULTS, **dict(zip(names, args, strict=False)), **(kwargs or {})}
        if given["running_mean"] is None:
            return func(*args, **(kwargs or {}))
        return self._normalized(given, instance)

    def _normalized(self, given: dict[str, Any], instance: bool) -> Tensor:
        x, old = given["input"], (given["running_mean"], given["running_var"])
        mean, var = (self.after(statistic) for statistic in old)
        if x.dtype != mean.dtype:  # half precision: torch's kernels keep statistics in single
            given = {**given, "input": x.to(mean.dtype)}
            return self._normalized(given, instance).to(x.dtype)
        channels = [1, -1, *(1,) * (x.dim() - 2)]
        training = given.get("use_input_stats", True) if instance else given.get("training", False)
        if not training:
            return _affine(x - mean.view(channels), var.view(channels), given, channels)
        dims = list(range(2, x.dim())) if instance else [0, *range(2, x.dim())]
        average = x.mean(dims, keepdim=True)
        centered = x - average
        variance = centered.square().mean(dims, keepdim=True)
        count = x.numel() // (x.shape[0] * x.shape[1] if instance else x.shape[1])
        a = float(given["momentum"])
        fresh = (average, variance * (count / max(count - 1, 1)))
        for held, before, batch in zip(old, (mean, var), fresh, strict=True):
            batch = batch.flatten(1).mean(0) if instance else batch.flatten()
            self._updated[id(held)] = (held, (1 - a) * before + a * batch)
        return _affine(centered, variance, given, channels)


@final
class Attached(TorchFunctionMode):
    """While it lasts, ``detach``, ``.data`` and ``no_grad`` have no effect.

    Models keep their moving averages outside of autograd, because no gradient of the loss should flow through them; yet
    the averages depend on the parameters, and that is the derivative asked for.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _DETACHING:
            return args[0]
        if func is torch._C._set_grad_enabled:
            return None
        return func(*args, **(kwargs or {}))


_DETACHING = {torch.detach, Tensor.detach, Tensor.detach_, Tensor.data.__get__}  # type: ignore[attr-defined]


def running_statistics(module: nn.Module) -> set[str]:
    """Names of the buffers that batch and instance normalization layers keep."""
    return {
        f"{name}.{buffer}" if name else buffer
        for name, part in module.named_modules()
        if isinstance(part, _NormBase)
        for buffer in ("running_mean", "running_var")
    }


def _affine(centered: Tensor, variance: Tensor, given: dict[str, Any], channels: Sequence[int]) -> Tensor:
    scale = (variance + given["eps"]).rsqrt()
    if given["weight"] is not None:
        scale = scale * given["weight"].view(channels)
    out = centered * scale
    return out if given["bias"] is None else out + given["bias"].view(channels)


_DEFAULTS = {"running_mean": None, "running_var": None, "weight": None, "bias": None, "momentum": 0.1, "eps": 1e-5}
_FORMS: dict[Any, tuple[tuple[str, ...], bool]] = {
    F.batch_norm: (("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps"), False),
    torch.batch_norm: (
        ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled"),
        False,
    ),
    F.instance_norm: (
        ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps"),
        True,
    ),
    torch.instance_norm: (
        (
            "input",
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "use_input_stats",
            "momentum",
            "eps",
            "cudnn_enabled",
        ),
        True,
    ),
}
"""The functions: names of their positional arguments, and whether the statistics are each example's own."""
