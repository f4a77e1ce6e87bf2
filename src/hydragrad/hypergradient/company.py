"""Whether a query's measurement is its own: the same, whichever queries are measured beside it."""

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from hydragrad.errors import UnsupportedError, message
from hydragrad.trajectory.agreement import tolerance
from hydragrad.trajectory.generators import GENERATORS, Looker, changed

_HALF = (torch.bfloat16, torch.float16)


def check_company(measure: Callable[[Tensor], Tensor], ids: Tensor, device: torch.device) -> None:
    """Refuse queries whose measurements depend on each other: a few of ``ids``, each measured beside itself alone.

    ``measure(ids) -> [n]``. What draws random numbers differs by those, and is let be.
    """
    together = measure(ids)
    scale = float(together.abs().max())
    for place in sorted({0, len(ids) // 2, len(ids) - 1}):
        by_itself = float(measure(ids[[place, place]])[0])  # twice: some models and losses take no batch of one
        beside = float(together[place])
        gap = abs(by_itself - beside)
        if not scale < float("inf") or gap <= tolerance(together.dtype) * scale:
            continue  # what is not finite is named as that elsewhere
        if _draws(measure, ids, together, device) or (
            gap <= tolerance(torch.bfloat16) * scale and _halves(measure, ids)
        ):
            return
        raise UnsupportedError(
            message(
                f"what is measured of query {int(ids[place])} depends on the queries measured beside it",
                expected=f"{by_itself:.6g}, as by itself",
                got=f"{beside:.6g} among {len(ids)} queries",
                cause="a layer that normalizes over the batch in evaluation mode (BatchNorm with "
                "track_running_stats=False), a loss over the whole batch (contrastive), or padding that the model "
                "does not mask",
                remedy="let such layers track statistics, pad every sample to one length, or give "
                "measurement(model, batch) -> [m] that measures each query by itself; or ask one query a call",
            )
        )


def _draws(measure: Callable[[Tensor], Tensor], ids: Tensor, before: Tensor, device: torch.device) -> bool:
    """Whether measuring moves a global generator, or gives other numbers the second time."""
    looker = Looker(device, [name for name in GENERATORS if name != "cuda" or device.type == "cuda"])
    first = looker.look()
    again = measure(ids)
    return bool(changed(first, looker.look(first))) or not torch.equal(before, again)


def _halves(measure: Callable[[Tensor], Tensor], ids: Tensor) -> bool:
    """Whether anything is computed in half precision, which rounds a batch of two otherwise than one of many."""
    with _Halves() as seen:
        measure(ids)
    return seen.any


@final
class _Halves(TorchDispatchMode):
    """While it lasts, notes whether an operation gives a tensor in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.any = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self.any |= isinstance(out, Tensor) and out.dtype in _HALF
        return out
