"""Private copies of a model, also of one that keeps what a forward pass computed."""

import copy
from typing import Any

import torch
from torch import Tensor, nn


def copy_of(model: nn.Module) -> nn.Module:
    """A deep copy. Tensors of an autograd graph in plain attributes, which torch refuses to copy, lose their graph.

    Such are the weight that ``torch.nn.utils.weight_norm`` computes before every call, or outputs kept to be looked at.
    """
    memo: dict[int, Any] = {}
    for part in model.modules():
        for value in vars(part).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                memo[id(value)] = _detached(value)
    return copy.deepcopy(model, memo)


def _detached(value: Tensor) -> Tensor:
    try:
        return value.detach().clone()
    except RuntimeError:  # left by a transform of torch.func that has ended: it has no value any more
        return torch.empty(0)
