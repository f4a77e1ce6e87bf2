"""The form of nested inputs: what a computation on them depends on beside the tensors' values."""

from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree


def form_of(value: Any, tensors: list[Tensor]) -> Any:
    """Structure, shapes and values that are no tensors, hashable; collects ``tensors`` in the order of pytree.

    Ten times faster than flattening for the usual tuples, lists and dicts, and called at every step.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        return (value.shape, value.dtype, value.device)
    if type(value) in (tuple, list):
        return (type(value), *[form_of(part, tensors) for part in value])
    if type(value) is dict:
        return (dict, *[(key, form_of(part, tensors)) for key, part in value.items()])
    leaves, structure = pytree.tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        try:
            hash(value)
        except TypeError:
            return repr(value)
        return (type(value), value)
    return (structure, *[form_of(leaf, tensors) for leaf in leaves])
