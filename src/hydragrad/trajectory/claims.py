"""Which yielded batches a step's gradient came from: accumulation, skipped batches, zeroed gradients."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn, final

from torch import Tensor

from hydragrad.errors import MismatchError, message
from hydragrad.trajectory.loaders import Ids
from hydragrad.trajectory.watching import Ran


@final
@dataclass(slots=True)
class PendingBatch:
    """A yielded batch that no step has claimed yet. ``place``: of a skipped one, how many micro-batches precede it."""

    ids: Ids
    digests: Tensor | None
    epoch: int
    loader: int
    backward: bool = False
    drawn: Any = None  # see RandomWatch.end
    ran: Ran | None = None
    place: int = 0
    content: Any = None  # the batch itself, if batches are kept


@final
@dataclass(slots=True)
class Gathered:
    """What has gathered since the last step."""

    batches: list[PendingBatch] = field(default_factory=list)
    skipped: list[PendingBatch] = field(default_factory=list)
    backwards: int = 0
    seen: int = 0  # batches that were there at the last backward pass

    def zeroed(self) -> None:
        """Gradients were thrown away: what had gone into them is skipped."""
        self.skipped += self.batches[: self.seen]
        del self.batches[: self.seen]
        self.seen = self.backwards = 0

    def claim(self) -> list[PendingBatch]:
        """The batches behind the gradient of a step; others become skipped.

        With as many backward passes as batches each had its own. With fewer, a batch is taken as skipped when the
        next batch of the same loader was asked for before any backward pass.
        """
        if not 0 < self.backwards < len(self.batches):
            return self.batches
        claimed = []
        for place, batch in enumerate(self.batches):
            followed = any(later.loader == batch.loader for later in self.batches[place + 1 :])
            if batch.backward or not followed:
                claimed.append(batch)
            else:
                batch.place = len(claimed)
                self.skipped.append(batch)
        return claimed


def refuse_without_batch(passing: bool, stepped: bool) -> NoReturn:
    """Refuse a step that no batch came before, ``passing`` over a loader; ``stepped``: other steps had theirs."""
    if passing:
        cause = "a second optimizer.step() on a batch whose step has been taken already, or batches fetched ahead"
        remedy = (
            "take one step for each batch, before the next is fetched; to take several, yield it several times: "
            "recording.batches(batches, indices=ids)"
        )
    elif stepped:
        cause = (
            "batches fetched ahead of their steps: list(recording.batches(loader)), itertools.cycle of it, a loop that "
            "holds the next batch already; or a loop that iterates the loader itself"
        )
        remedy = (
            "fetch each batch after the step of the one before it: `for batch in recording.batches(loader):` with the "
            "step inside, anew for each epoch; workers of the loader (num_workers) may prefetch"
        )
    else:
        cause = "a loop that iterates the loader itself"
        remedy = "write `for batch in recording.batches(loader):` in the training loop"
    raise MismatchError(
        message(
            "an optimizer step without a recorded batch",
            expected="each step's batches to come from recording.batches, fetched since the step before",
            cause=cause,
            remedy=remedy,
        )
    )


@final
class BackwardWatch:
    """Tells backward passes, and gradients zeroed between them, by looking at one parameter's gradient.

    Accumulating writes once into the same tensor; setting to None or zeroing in place shows as another tensor or as
    more writes. That tells gradient accumulation from a batch whose gradient was thrown away (a skipped step).
    """

    def __init__(self, seen: Callable[[bool], None]) -> None:
        self._seen = seen
        self._param: Tensor | None = None
        self._handle: Any = None
        self._grad: Tensor | None = None
        self._version = -1

    def watch(self, params: dict[str, Tensor], none: frozenset[str]) -> None:
        """Watch the last parameter that trains, and is not known (``none``) to get no gradient."""
        trained = [param for name, param in params.items() if param.requires_grad and name not in none]
        if trained and trained[-1] is not self._param:
            self.stop()
            self._param = trained[-1]
            self._handle = self._param.register_post_accumulate_grad_hook(self._accumulated)

    def stop(self) -> None:
        """Take the hook away."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = self._grad = self._param = None

    def rewritten(self) -> None:
        """The gradients were changed in place by someone known: that is no sign of zeroing."""
        if self._param is not None and self._param.grad is not None and self._param.grad is self._grad:
            self._version = self._param.grad._version

    def _accumulated(self, param: Tensor) -> None:
        grad = param.grad
        assert grad is not None
        fresh = grad is not self._grad or grad._version != self._version + 1
        self._grad, self._version = grad, grad._version
        self._seen(fresh)
