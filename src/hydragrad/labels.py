"""Samples that carry one integer label in their last part, as in (image, label)."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hydragrad.errors import MismatchError, message

Relabel = Callable[[Any, int], Any]
"""From a sample and a label to the same sample with that label."""


def label_of(data: Any, place: int) -> int | None:
    """The last part of a sample if it is one integer, as in (image, label); else None."""
    sample = data[place]
    if not isinstance(sample, tuple | list) or len(sample) < 2:
        return None
    label = sample[-1]
    if isinstance(label, Tensor) and label.numel() == 1 and not label.is_floating_point():
        return int(label)
    return label if isinstance(label, int) else None


def labels_of(data: Any) -> Tensor | None:
    """The labels int64 [N] of all samples; None where a sample has none."""
    labels = [label_of(data, place) for place in range(len(data))]
    return None if any(label is None for label in labels) else torch.tensor(labels, dtype=torch.int64)


def with_label(sample: Any, label: int) -> Any:
    """The sample with another label in its last part, of the same type. Raises MismatchError without such a part."""
    given = sample[-1] if isinstance(sample, tuple | list) and len(sample) > 1 else None
    if isinstance(given, Tensor) and given.numel() == 1 and not given.is_floating_point():
        new: Any = torch.full_like(given, label)
    elif isinstance(given, int):
        new = type(given)(label)
    else:
        raise MismatchError(
            message(
                "a sample has no label that could be changed",
                expected="a tuple or list whose last part is one integer, as in (image, label)",
                got=type(sample).__name__ if given is None else f"a last part of type {type(given).__name__}",
                remedy="give relabel=(sample, label) -> sample, or the new samples themselves",
            )
        )
    kind: Any = type(sample)
    return kind(*sample[:-1], new) if hasattr(sample, "_fields") else kind([*sample[:-1], new])  # a named tuple, or not
