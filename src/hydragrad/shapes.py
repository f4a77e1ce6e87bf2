"""Shapes and dtypes in signatures: jaxtyping where it is installed (while testing), plain tensors elsewhere."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from jaxtyping import Float, Int
else:
    try:
        from jaxtyping import Float, Int
    except ImportError:  # a development tool, not a dependency

        class Float:
            """Stands in for jaxtyping: ``Float[Tensor, "N M"]`` is Tensor."""

            def __class_getitem__(cls, item):
                return item[0]

        Int = Float

__all__ = ["Float", "Int", "in_rows"]


def in_rows(x: Tensor, lead: int = 1) -> Tensor:
    """A block ``[*lead axes, *shape]`` as ``[*lead axes, numel]``: 1 for a parameter that is a single number."""
    return x.reshape(*x.shape[:lead], -1)
