"""What is noted of each optimizer step: as little as possible while it is taken, the rest when a segment is written."""

from collections.abc import Mapping
from typing import Any, NamedTuple, final

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from hydragrad.step.clipping import Clip
from hydragrad.trajectory.claims import PendingBatch
from hydragrad.trajectory.clips import ClipNotes
from hydragrad.trajectory.fingerprints import GradientFingerprint, Reading
from hydragrad.trajectory.hyper import HyperNotes
from hydragrad.trajectory.loaders import id_tensor
from hydragrad.trajectory.randomness import Draw, DrawWriter
from hydragrad.trajectory.sparing import fingerprinted
from hydragrad.trajectory.state import Hyper, Pass, StepRecord
from hydragrad.trajectory.watching import Modes


@final
class Noted(NamedTuple):
    """A step as it was taken; what its StepRecord is made of, once there is time."""

    number: int
    batches: list[PendingBatch]
    skipped: list[PendingBatch]
    groups: tuple[Hyper, ...]
    without_grad: frozenset[str]
    frozen: frozenset[str]
    modes: Mapping[str, bool]
    clips: tuple[Clip, ...]
    scale: float | None
    passes: tuple[Pass, ...]
    draws: tuple[Draw | None, ...]
    reading: Reading | None
    """What was read of its gradients; None: nothing."""

    def contents(self) -> list[Any]:
        """The batches themselves, if they are kept: those that replay will run."""
        moved = [batch for batch in self.skipped if batch.ran is not None and batch.ran.modes is not None]
        return [batch.content for batch in (*self.batches, *sorted(moved, key=lambda batch: batch.place))]


@final
class StepNotes:
    """Makes the records of a model's steps."""

    def __init__(
        self,
        params: Mapping[str, Tensor],
        optimizer: Optimizer,
        modes: Modes,
        clips: ClipNotes,
        scaler: GradScaler | None,
    ) -> None:
        self._names, self._params = list(params), list(params.values())
        self._hyper, self._modes, self._clips, self._scaler = HyperNotes(dict(params), optimizer), modes, clips, scaler
        self._fingerprint = GradientFingerprint([param.numel() for param in self._params])
        held = {name for names in self._hyper.names for name in names}
        self._held = [param if name in held else None for name, param in params.items()]
        """The parameters whose gradients the optimizer reads: those of others may hold anything."""
        self._draws = DrawWriter()
        self._known: tuple[list[bool], list[bool]] = ([], [])
        self._none, self._frozen = _NOBODY, _NOBODY
        self.groups = self._hyper.names
        """Names of the parameters of each param group."""

    def hyper(self) -> tuple[Hyper, ...]:
        """Hyperparameters of every param group now."""
        return self._hyper.now()

    def note(self, index: int, batches: list[PendingBatch], skipped: list[PendingBatch]) -> Noted:
        """The step that is about to be taken, its gradients complete."""
        self._look()
        return Noted(
            index,
            batches,
            skipped,
            self._hyper.now(),
            self._none,
            self._frozen,
            self._modes.now(),
            self._clips.take(),
            None if self._scaler is None else self._scaler.get_scale(),
            *self._in_order(batches, skipped),
            self._reading() if fingerprinted(index) else None,
        )

    def _reading(self) -> Reading:
        return self._fingerprint.read([None if param is None else param.grad for param in self._held])

    def forget(self) -> None:
        """A checkpoint: replay may start here, so no draw goes on across it."""
        self._draws.forget()

    def records(self, steps: list[Noted]) -> list[StepRecord]:
        """The records of steps, in whatever thread."""
        found = iter(self._fingerprint.finish([step.reading for step in steps if step.reading is not None]))
        return [_record(step, None if step.reading is None else next(found)) for step in steps]

    def _look(self) -> None:
        """Find names without a gradient, and names that hold one without requiring it: the same objects if the same."""
        known = [param.grad is None for param in self._params], [param.requires_grad for param in self._params]
        if known != self._known:
            self._known = known
            none = frozenset([name for name, missing in zip(self._names, known[0], strict=True) if missing])
            self._none = self._none if none == self._none else none
            self._frozen = frozenset(
                [name for name, missing, trains in zip(self._names, *known, strict=True) if not missing and not trains]
            )

    def _in_order(
        self, batches: list[PendingBatch], skipped: list[PendingBatch]
    ) -> tuple[tuple[Pass, ...], tuple[Draw | None, ...]]:
        """Skipped batches that changed buffers, and what every batch drew, noted in the order of training."""
        waiting = [batch for batch in skipped if batch.ran is not None and batch.ran.modes is not None]
        if not waiting:
            return (), tuple([self._draws.draw(batch.drawn) for batch in batches])
        passes, draws = [], []
        for k, batch in enumerate([*batches, None]):
            for one in [one for one in waiting if one.place == k]:
                assert one.ran is not None
                assert one.ran.modes is not None
                draw = self._draws.draw(one.drawn)
                self._draws.forget()  # what the loop drew before it asked for the next batch is not this one's
                passes.append(
                    Pass(id_tensor(one.ids), one.digests, one.epoch, k, one.ran.modes, one.ran.autocast, draw)
                )
            if batch is not None:
                draws.append(self._draws.draw(batch.drawn))
        return tuple(passes), tuple(draws)


def _record(step: Noted, fingerprint: Tensor | None) -> StepRecord:
    noted = [(id_tensor(b.ids), b.digests, b.epoch, b.loader, b.ran and b.ran.autocast) for b in step.batches]
    ids, digests, epochs, loaders, autocast = zip(*noted, strict=True)
    return StepRecord(
        index=step.number,
        epoch=epochs[0],
        batches=ids,
        digests=digests,
        groups=step.groups,
        without_grad=step.without_grad,
        fingerprint=fingerprint,
        modes=step.modes,
        epochs=epochs,
        loaders=loaders,
        skipped=tuple([id_tensor(batch.ids) for batch in step.skipped]),
        draws=step.draws,
        clips=step.clips,
        scale=step.scale,
        autocast=autocast,
        frozen=step.frozen,
        passes=step.passes,
    )


_NOBODY: frozenset[str] = frozenset()
