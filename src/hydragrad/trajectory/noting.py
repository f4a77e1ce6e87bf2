"""What is noted of each optimizer step: as little as possible while it is taken, the rest when a segment is written."""

from collections.abc import Mapping
from typing import Any, NamedTuple, final

from torch import Tensor
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from hydragrad.trajectory.claims import PendingBatch
from hydragrad.trajectory.clips import ClipNotes
from hydragrad.trajectory.fingerprints import GradientFingerprint, Reading
from hydragrad.trajectory.optimizers import HyperNotes
from hydragrad.trajectory.randomness import Draw, DrawWriter
from hydragrad.trajectory.state import Hyper, Pass, StepRecord
from hydragrad.trajectory.watching import Modes


@final
class Noted(NamedTuple):
    """A step, and what was read of its gradients."""

    fields: dict[str, Any]
    """Of its StepRecord, but for the fingerprint."""
    reading: Reading


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
        self._draws = DrawWriter()
        self._none: frozenset[str] = frozenset()
        self.groups = self._hyper.names
        """Names of the parameters of each param group."""

    def hyper(self) -> tuple[Hyper, ...]:
        """Hyperparameters of every param group now."""
        return self._hyper.now()

    def note(self, index: int, batches: list[PendingBatch], skipped: list[PendingBatch]) -> Noted:
        """The step that is about to be taken, its gradients complete."""
        grads = [param.grad for param in self._params]
        without, frozen = self._without(grads)
        passes, draws = self._in_order(batches, skipped)
        fields = {
            "index": index,
            "epoch": batches[0].epoch,
            "batches": tuple([batch.ids for batch in batches]),
            "digests": tuple([batch.digests for batch in batches]),
            "groups": self._hyper.now(),
            "without_grad": without,
            "modes": self._modes.now(),
            "epochs": tuple([batch.epoch for batch in batches]),
            "loaders": tuple([batch.loader for batch in batches]),
            "skipped": tuple([batch.ids for batch in skipped]),
            "draws": draws,
            "clips": self._clips.take(),
            "scale": None if self._scaler is None else self._scaler.get_scale(),
            "autocast": tuple([batch.ran and batch.ran.autocast for batch in batches]),
            "frozen": frozen,
            "passes": passes,
        }
        return Noted(fields, self._fingerprint.read(grads))

    def segment(self, noted: list[Noted]) -> list[StepRecord]:
        """The records of steps up to a checkpoint: replay may start there, so no draw goes on across it."""
        self._draws.forget()
        fingerprints = self._fingerprint.finish([one.reading for one in noted])
        return [StepRecord(**one.fields, fingerprint=found) for one, found in zip(noted, fingerprints, strict=True)]

    def _without(self, grads: list[Tensor | None]) -> tuple[frozenset[str], frozenset[str]]:
        """Names without a gradient, and names that hold one without requiring it."""
        none = frozenset([name for name, grad in zip(self._names, grads, strict=True) if grad is None])
        if none != self._none:
            self._none = none
        if all(param.requires_grad for param in self._params):
            return self._none, _NOBODY
        frozen = [
            n for n, p, g in zip(self._names, self._params, grads, strict=True) if g is not None and not p.requires_grad
        ]
        return self._none, frozenset(frozen)

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
                passes.append(Pass(one.ids, one.digests, one.epoch, k, one.ran.modes, one.ran.autocast, draw))
            if batch is not None:
                draws.append(self._draws.draw(batch.drawn))
        return tuple(passes), tuple(draws)


_NOBODY: frozenset[str] = frozenset()
