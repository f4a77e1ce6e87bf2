"""Batches themselves in the store, for data that cannot be made again: tensors, and the containers they lay in."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hydragrad.errors import UnsupportedError, message
from hydragrad.files import load_tensors, reading, save_tensors


def keep(batch: Any) -> Any:
    """A copy of a batch on the CPU, which nothing that the loop does to it will change; refused for odd containers."""
    if isinstance(batch, Tensor) and batch.layout == torch.strided:
        return batch.detach().to("cpu", copy=True)
    if isinstance(batch, np.ndarray) and batch.dtype.kind in "biufc":
        return batch.copy()
    if batch is None or type(batch) in (str, bool, int, float):
        return batch
    if type(batch) in (list, tuple):
        parts = [keep(part) for part in batch]
        return tuple(parts) if type(batch) is tuple else parts
    if isinstance(batch, Mapping) and all(isinstance(key, (str, int)) for key in batch):
        return {key: keep(part) for key, part in batch.items()}
    raise UnsupportedError(
        message(
            "a batch cannot be kept",
            expected="tensors, arrays, numbers and strings in lists, tuples and dicts",
            got=type(batch).__name__,
            remedy="let collate_fn return such a batch, or record without keep_batches",
        )
    )


def encode_batches(batches: Sequence[Any]) -> bytes:
    """Kept batches as one file: their tensors by number, their containers as JSON."""
    tensors: dict[str, Tensor] = {}

    def form(part: Any) -> Any:
        if isinstance(part, (Tensor, np.ndarray)):
            name = str(len(tensors))
            tensors[name] = torch.as_tensor(part)
            return {"tensor" if isinstance(part, Tensor) else "array": name}
        if isinstance(part, (list, tuple)):
            return {type(part).__name__: [form(inner) for inner in part]}
        if isinstance(part, dict):
            return {"dict": [[key, form(inner)] for key, inner in part.items()]}
        return {"value": part}

    forms = [form(batch) for batch in batches]
    return save_tensors(tensors, {"batches": forms})


def decode_batches(path: Path, data: bytes) -> list[Any]:
    """Inverse of ``encode_batches``."""
    tensors, tables = load_tensors(path, data)

    def made(form: dict[str, Any]) -> Any:
        ((kind, part),) = form.items()
        if kind == "tensor":
            return tensors[part]
        if kind == "array":
            return tensors[part].numpy()
        if kind == "dict":
            return {key: made(inner) for key, inner in part}
        if kind in ("list", "tuple"):
            inner = [made(inner) for inner in part]
            return tuple(inner) if kind == "tuple" else inner
        return part

    with reading(path):
        return [made(form) for form in tables["batches"]]
