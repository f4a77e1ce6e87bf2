"""Which buffers of a module are written to."""

from typing import final

from torch import Tensor, nn

from hydragrad.errors import UnsupportedError, message


@final
class Writes:
    """The buffers of a module as they are held now, and later the names of those written to or replaced since."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._held = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}

    def since(self) -> set[str]:
        """Names of the buffers written to since."""
        return {name for name, now in self._module.named_buffers() if not self._same(name, now)}

    def _same(self, name: str, now: Tensor) -> bool:
        before, version = self._held.get(name, (None, 0))
        return now is before and now._version == version


def refuse_written(written: set[str], step: int) -> None:
    """Refuse a step that writes to a buffer which whoever differentiates the run takes for a constant."""
    if written:
        raise UnsupportedError(
            message(
                f"step {step} writes to the buffer {min(written)!r}, which seemed to be a constant",
                expected="buffers that change in the first step, or differ in a stored state",
                cause="a buffer that is written to now and then, and holds its first value again wherever a state is "
                "stored",
                remedy="record with checkpoint_every=1, or let every forward pass write to it",
            )
        )
