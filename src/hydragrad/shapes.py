"""Shapes and dtypes in signatures: jaxtyping where it is installed (while testing), plain tensors elsewhere."""

from typing import TYPE_CHECKING

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

__all__ = ["Float", "Int"]
