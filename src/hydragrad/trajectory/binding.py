"""Binding a recorded run to live objects: what can be compared without running anything."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import default_collate, default_convert

from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.problem import Coefficients, Reduction
from hydragrad.trajectory.settings import no_module
from hydragrad.trajectory.state import Manifest, StepRecord


def check_model(model: nn.Module, manifest: Manifest) -> None:
    """Refuse a model whose parameters or buffers are not named, shaped and typed as the recorded ones."""
    if not isinstance(model, nn.Module):
        raise UnsupportedError(no_module(model))
    params, buffers = (
        {name: {"shape": list(x.shape), "dtype": str(x.dtype).removeprefix("torch.")} for name, x in tensors}
        for tensors in (model.named_parameters(), model.named_buffers())
    )
    _check_names("parameter", manifest.params, params)
    _check_names("buffer", manifest.buffers, buffers)


def _check_names(kind: str, recorded: dict[str, dict[str, Any]], given: dict[str, dict[str, Any]]) -> None:
    missing, extra = sorted(set(recorded) - set(given)), sorted(set(given) - set(recorded))
    if missing or extra:
        raise MismatchError(
            message(
                f"the model's {kind}s are not the recorded ones",
                expected=f"{len(recorded)} {kind}s; missing: {missing[:5] or 'none'}",
                got=f"{len(given)} {kind}s; unknown: {extra[:5] or 'none'}",
                cause="another architecture, or a wrapper (DataParallel) around the model",
                remedy="give the model as it was given to hydragrad.record",
            )
        )
    for name, spec in recorded.items():
        for what in ("shape", "dtype"):  # what trains is told step by step, whatever the model's final form
            if given[name][what] != (value := spec[what]):
                raise MismatchError(
                    message(
                        f"{what} of {kind} {name!r} differs from the recorded one",
                        expected=value,
                        got=given[name][what],
                        cause="a model built with other sizes or another dtype",
                        remedy="build the model as it was when recording began",
                    )
                )


def lay_out(params: Mapping[str, Tensor], manifest: Manifest) -> None:
    """Give parameters the memory layout they trained in (channels_last): kernels, and so rounding, depend on it."""
    for name, param in params.items():
        shape, stride = param.shape, manifest.params[name].get("stride")
        plain = torch.empty(shape, device="meta").stride()
        if param.stride() != tuple(stride or plain):
            fresh = torch.empty_strided(shape, stride or plain, dtype=param.dtype, device=param.device)
            param.data = fresh.copy_(param.detach())


def check_data(data: Any, manifest: Manifest, steps: tuple[StepRecord, ...]) -> None:
    """Refuse data of another length than the recorded data set."""
    try:
        length = len(data)
    except TypeError as error:
        raise MismatchError(
            message("data has no length", expected="__len__ and __getitem__", got=type(data).__name__)
        ) from error
    if manifest.data_length is not None and length != manifest.data_length:
        raise MismatchError(
            message(
                "the data has another length than the recorded data set",
                expected=f"{manifest.data_length} examples",
                got=f"{length} examples",
                cause="another split, or a Subset in place of the whole (or the whole in place of a Subset)",
                remedy="give the data set that the recorded loader read",
            )
        )
    largest = max((int(ids.max()) for step in steps for ids in step.batches if len(ids)), default=-1)
    if largest >= length:
        raise MismatchError(
            message("the data is shorter than the recorded ids", expected=f"over {largest} examples", got=length)
        )


def choose_reduction(given: "str | Coefficients | Reduction | None", manifest: Manifest) -> Reduction:
    """The reduction given, else the recorded one, else the mean; refused if it contradicts the record."""
    reduction = Reduction(given if given is not None else manifest.reduction or "mean")
    if manifest.reduction is not None and reduction.name not in (None, manifest.reduction):
        raise MismatchError(
            message(
                "the reduction contradicts the recorded one",
                expected=f"reduction={manifest.reduction!r}",
                got=f"reduction={reduction.name!r}",
                remedy="leave reduction out, or name what the loop did",
            )
        )
    return reduction


def choose_collate(given: Callable[[Any], Any] | None, manifest: Manifest) -> Callable[[Any], Any]:
    """The collate function given, else torch's default if the recorded loader used it; refused otherwise."""
    if given is not None:
        return given
    if not manifest.collate.get("default"):
        raise MismatchError(
            message(
                "the recorded loader had a collate function of its own",
                expected=f"collate_fn={manifest.collate.get('function')}",
                got="collate_fn=None",
                remedy="give that function to hydragrad.load: code is not recorded",
            )
        )
    return default_collate if manifest.collate["mode"] == "samples" else default_convert
