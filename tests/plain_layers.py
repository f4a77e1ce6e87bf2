"""Layers in formulas, so that the oracles differentiate what torch's own kernels do not (or do wrongly)."""

import copy
from typing import Any

from torch import Tensor, nn


class PlainNorm(nn.Module):
    """Batch or instance norm in formulas, so that the running statistics carry derivatives (torch's own do not)."""

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor

    def __init__(self, of: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.eps, self.momentum = of.weight, of.bias, of.eps, of.momentum
        self.each = isinstance(of, (nn.InstanceNorm1d, nn.InstanceNorm2d))  # statistics of each example
        self.tracks = of.running_mean is not None
        for name, buffer in of.named_buffers():
            self.register_buffer(name, buffer)

    def forward(self, x: Tensor) -> Tensor:
        axes = "bc" if self.each else "c"
        flat = x.reshape(*x.shape[:2], -1)
        if self.training or not self.tracks:
            mean, var = self.statistics(flat)
        else:
            mean, var = self.running_mean, self.running_var
            axes = "c"
        place = {"bc": (slice(None), slice(None), None), "c": (None, slice(None), None)}[axes]
        out = (flat - mean[place]) * (var[place] + self.eps) ** -0.5
        if self.weight is not None:
            out = out * self.weight[None, :, None] + self.bias[None, :, None]
        return out.reshape(x.shape)

    def statistics(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        rows = flat if self.each else flat.transpose(0, 1).flatten(1)
        n = rows.shape[-1]
        mean = rows.sum(-1) / n
        var = (rows - mean[..., None]).pow(2).sum(-1) / n
        if self.tracks:
            self.num_batches_tracked = self.num_batches_tracked + 1
            rate = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            new_mean, new_var = (x.mean(0) if self.each else x for x in (mean, var * n / (n - 1)))
            self.running_mean = self.running_mean + rate * (new_mean - self.running_mean)
            self.running_var = self.running_var + rate * (new_var - self.running_var)
        return mean, var


def plain_weight_norm(g: Tensor, v: Tensor) -> Tensor:
    return g * v / v.square().sum(list(range(1, v.ndim)), keepdim=True).sqrt()


def differentiable(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double()
    for name, module in list(model.named_modules()):
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.InstanceNorm1d, nn.InstanceNorm2d)):
            parent = model.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], PlainNorm(module).train(module.training))
        if hasattr(module, "outside"):  # a moving average kept outside of autograd: here it is within
            module.__dict__["outside"] = False
        if type(module).__name__ == "_WeightNorm":  # the fused kernel's second derivative is wrong in torch 2.13
            module.forward = plain_weight_norm  # type: ignore[method-assign]
    return model
