"""The state of the random number generators that training draws from, kept and restored."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class RandomState:
    """torch's generators at one moment: the CPU's, and that of each CUDA device in use.

    Example: ``state = RandomState.now()``, later ``with state.restored(): ...`` draws the same numbers again.
    """

    cpu: Tensor
    cuda: tuple[Tensor, ...] = ()

    @staticmethod
    def now() -> "RandomState":
        """The present state."""
        devices = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
        return RandomState(torch.get_rng_state(), tuple(devices))

    @contextlib.contextmanager
    def restored(self) -> Iterator[None]:
        """Inside, the generators go on from this state; afterwards they are as the caller left them."""
        with torch.random.fork_rng(devices=range(len(self.cuda))):
            torch.set_rng_state(self.cpu)
            for device, state in enumerate(self.cuda):
                torch.cuda.set_rng_state(state, device)
            yield
