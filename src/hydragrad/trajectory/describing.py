"""The description of a run, written once when its first step is taken."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from hydragrad.step.known import description
from hydragrad.trajectory.format import VERSION
from hydragrad.trajectory.sources import Watched
from hydragrad.trajectory.state import Manifest
from hydragrad.trajectory.surroundings import surroundings
from hydragrad.trajectory.watching import is_compiled, unwrapped


def describe_run(
    model: nn.Module,
    optimizer: Optimizer,
    groups: list[list[str]],
    modes: Mapping[str, bool],
    source: Watched | None,
    batch: list[dict[str, Any]],
    reduction: str | None,
    checkpoint_every: int,
) -> Manifest:
    """The manifest: what is to be given again at load, and how the data was fetched."""
    collate = {"mode": source.mode, **source.collate} if source is not None else {"mode": "samples", "default": True}
    plain = unwrapped(model)
    params = dict(plain.named_parameters())
    return Manifest(
        version=VERSION,
        torch=torch.__version__,
        params={name: {**_spec(p), "requires_grad": p.requires_grad} for name, p in params.items()},
        buffers={name: _spec(buffer) for name, buffer in plain.named_buffers()},
        optimizer={**description(type(optimizer)), "groups": groups},
        modes=dict(modes),
        data_length=source.length if source is not None else None,
        collate=collate,
        batch=batch,
        reduction=reduction,
        checkpoint_every=checkpoint_every,
        device=str(next((p.device for p in params.values()), torch.device("cpu"))),
        extra={"compiled": is_compiled(model), **surroundings()},
    )


def _spec(tensor: Tensor) -> dict[str, Any]:
    spec = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
    # not is_contiguous(): that overlooks axes of length 1, by whose strides kernels tell channels_last
    plain = torch.empty(tensor.shape, device="meta").stride()
    return spec if tensor.stride() == plain else {**spec, "stride": list(tensor.stride())}
