"""Watching a torch training loop: batches through ``Recording.batches``, steps through the optimizer's hooks."""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from hydragrad.amounts import Amount, bytes_of
from hydragrad.errors import HydragradError, MismatchError, StoreError, UnsupportedError, message
from hydragrad.trajectory.claims import BackwardWatch, Gathered, PendingBatch
from hydragrad.trajectory.clips import ClipNotes
from hydragrad.trajectory.describing import describe_run
from hydragrad.trajectory.digests import batch_digests, describe_batch
from hydragrad.trajectory.keeping import keep
from hydragrad.trajectory.noting import Noted, StepNotes
from hydragrad.trajectory.randomness import RandomState, RandomWatch
from hydragrad.trajectory.sources import Sources, Watched
from hydragrad.trajectory.state import State, capture_state, live_buffers
from hydragrad.trajectory.thinning import Thinning
from hydragrad.trajectory.watching import ModelWatch, Modes, unwrapped
from hydragrad.trajectory.writer import StoreWriter


def record(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    reduction: str | None = None,
    checkpoint_every: int = 100,
    checkpoint_bytes: Amount | None = None,
    overwrite: bool = False,
    scaler: GradScaler | None = None,
    keep_batches: bool = False,
) -> "Recording":
    """Record a training loop into the folder ``path``; a context manager that changes none of the loop's numbers.

    ``reduction`` ("mean" or "sum") is an optional note of how the loop reduces a batch's losses; the full state is
    stored every ``checkpoint_every`` steps; ``checkpoint_bytes`` (bytes, or "1 GB"): what these states may take on disk
    together: a state that does not fit drops every second one and doubles the spacing; ``scaler``: the loop's
    torch.amp.GradScaler, whose scales are noted;
    ``keep_batches``: store the batches themselves, for data that cannot be made again. That costs their size on disk
    for every step (64 images of 3 x 32 x 32 floats: 0.8 MB a step), and memory for those of ``checkpoint_every`` steps.
    Raises StoreError if the folder holds a run (unless ``overwrite``), UnsupportedError for what cannot be recorded.

    Example::

        with hydragrad.record("runs/mnist", model, optimizer) as recording:
            for batch in recording.batches(loader):
                ...  # zero_grad, backward, step as ever
    """
    if reduction not in (None, "mean", "sum"):
        raise UnsupportedError(
            message(
                "unknown reduction",
                expected="'mean', 'sum' or None",
                got=repr(reduction),
                remedy="code is not recorded: give a callable reduction to hydragrad.load instead",
            )
        )
    if not isinstance(checkpoint_every, int) or checkpoint_every < 1:
        raise UnsupportedError(message("bad checkpoint_every", expected="a positive int", got=repr(checkpoint_every)))
    if scaler is not None and scaler.is_enabled() and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise UnsupportedError(
            message(
                "a fused optimizer skips a scaler's overflowing steps inside its kernel",
                expected="an optimizer whose step() is not called on overflow",
                got=f"{type(optimizer).__name__}(fused=True)",
                cause="the gradients are unscaled, and the step perhaps skipped, where no recorder can see it",
                remedy="make the optimizer with fused=False",
            )
        )
    limit = None if checkpoint_bytes is None else bytes_of(checkpoint_bytes, "checkpoint_bytes")
    thinning = Thinning(checkpoint_every, limit)
    return Recording(
        Path(path), model, optimizer, reduction, checkpoint_every, overwrite, scaler, keep_batches, thinning
    )


@final
class Recording:
    """The context manager that ``record`` returns: see there."""

    def __init__(
        self,
        path: Path,
        model: nn.Module,
        optimizer: Optimizer,
        reduction: str | None,
        checkpoint_every: int,
        overwrite: bool,
        scaler: GradScaler | None,
        keep_batches: bool,
        thinning: Thinning,
    ) -> None:
        self._path, self._model, self._optimizer = path, model, optimizer
        self._reduction, self._checkpoint_every, self._overwrite = reduction, checkpoint_every, overwrite
        self._thinning = thinning
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self._plain = plain = unwrapped(model)
        self._params: dict[str, Tensor] = dict(plain.named_parameters())
        self._buffers: dict[str, Tensor] = dict(plain.named_buffers())
        self._device = next((param.device for param in self._params.values()), torch.device("cpu"))
        self._modes = Modes(plain)
        self._watch = ModelWatch(model, plain, self._modes, self._device)
        self._backwards = BackwardWatch(self._backward_seen)
        self._sources, self._clips = Sources(), ClipNotes(self._params)
        self._notes = StepNotes(self._params, optimizer, self._modes, self._clips, self._scaler)
        self._random = RandomWatch(self._device)
        self._writer: StoreWriter | None = None
        self._open = contextlib.ExitStack()
        self._initial: State | None = None
        self._batch_leaves: list[dict[str, Any]] = []
        self._now = Gathered()
        self._taken: Noted | None = None  # between the hooks of one optimizer step
        self._steps: list[Noted] = []
        self._kept: list[Any] | None = [] if keep_batches else None
        self._count = 0
        self._within = False  # between a batch and what follows it

    def __enter__(self) -> "Recording":
        self._writer = StoreWriter(self._path, self._thinning, overwrite=self._overwrite)
        self._open.enter_context(self._watch.watching())
        self._open.callback(self._optimizer.register_step_pre_hook(self._before_step).remove)
        self._open.callback(self._optimizer.register_step_post_hook(self._after_step).remove)
        self._open.callback(self._backwards.stop)
        self._backwards.watch(self._params, frozenset())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()
        assert self._writer is not None
        try:
            if not self._writer.started and kind is None:
                self._start()
            if self._writer.started:
                self._end(self._writer, kind, error)
        finally:
            self._writer.close()
            self._writer = None

    def _end(self, writer: StoreWriter, kind: type[BaseException] | None, error: BaseException | None) -> None:
        """Write what is left and how the run ended; where that fails, what was written before stands, and is read."""
        failed: StoreError | None = None
        torn = self._taken is not None or (bool(self._now.batches) and bool(self._buffers))
        try:
            self._flush(None if torn else self._capture())
        except StoreError as refused:
            failed = refused
        reason = f"{kind.__name__}: {error}" if kind is not None else f"StoreError: {failed}" if failed else ""
        leftover = [batch.ids.tolist() for batch in (*self._now.skipped, *self._now.batches)]
        try:
            writer.finish(complete=not reason, reason=reason, skipped=leftover)
        except StoreError as refused:
            failed = failed or refused
        if failed is not None and kind is None:
            raise failed

    def batches(self, loader: Iterable[Any], indices: Iterable[Any] | None = None) -> "RecordedBatches":
        """Iterate ``loader`` (an ordinary DataLoader) and note which examples each batch holds.

        For anything else than a DataLoader give ``indices``: the ids of each batch, in the same order. The result has
        a length if ``loader`` has, and may be iterated once per epoch.
        """
        return RecordedBatches(self, *self._sources.watch(loader, indices))

    def clip_grad_norm_(
        self,
        parameters: Tensor | Iterable[Tensor],
        max_norm: float,
        norm_type: float = 2.0,
        error_if_nonfinite: bool = False,
        foreach: bool | None = None,
    ) -> Tensor:
        """``torch.nn.utils.clip_grad_norm_``, noted so that replay and derivatives clip too; returns its total norm.

            g <- min(1, max_norm / (||g||_p + 1e-6)) g        p = norm_type

        Call it once the step's gradient is complete. Raises MismatchError for tensors that are no parameters of the
        model. Example: ``recording.clip_grad_norm_(model.parameters(), 1.0)``.
        """
        norm = self._clips.norm_(parameters, max_norm, norm_type, error_if_nonfinite, foreach)
        self._backwards.rewritten()
        return norm

    def clip_grad_value_(
        self, parameters: Tensor | Iterable[Tensor], clip_value: float, foreach: bool | None = None
    ) -> None:
        """``torch.nn.utils.clip_grad_value_`` (every element clamped to [-clip_value, clip_value]), noted likewise.

        Example: ``recording.clip_grad_value_(model.parameters(), 0.5)``.
        """
        self._clips.value_(parameters, clip_value, foreach)
        self._backwards.rewritten()

    def _iterate(self, place: int, watched: Watched) -> Iterator[Any]:
        if self._writer is None:
            raise HydragradError(
                message(
                    "this recording is not open", remedy="iterate inside `with hydragrad.record(...) as recording:`"
                )
            )
        self._end_batch()  # of another loader
        epoch = self._sources.begin(place)
        for ids, batch in watched:
            if self._initial is None:
                self._initial, self._batch_leaves = self._capture(), describe_batch(batch)
            pending = PendingBatch(ids, batch_digests(batch, len(ids)), epoch, place)
            if self._kept is not None:
                pending.content = keep(batch)
            self._now.batches.append(pending)
            self._begin_batch()
            yield batch
            self._end_batch()

    def _begin_batch(self) -> None:
        self._watch.begin()
        self._random.begin()
        self._within = True

    def _end_batch(self) -> None:
        """The loop went on from the last yielded batch: to its step, or to the next batch."""
        if self._within and self._now.batches:
            self._now.batches[-1].drawn = self._random.end()
            self._now.batches[-1].ran = self._watch.end()
        self._within = False

    def _backward_seen(self, fresh: bool) -> None:
        """A backward pass reached the parameters; ``fresh``: into gradients that had been zeroed before."""
        if fresh:
            self._now.zeroed()
        self._clips.backward(fresh)
        self._watch.backward_seen()
        self._now.backwards += 1
        self._now.seen = len(self._now.batches)
        if self._now.batches:
            self._now.batches[-1].backward = True

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._writer is not None
        _refuse_closure(optimizer, args, kwargs)
        self._end_batch()
        batches = self._now.claim()
        if not batches:
            raise MismatchError(
                message(
                    "an optimizer step without a recorded batch",
                    expected="each step's batches to come from recording.batches",
                    remedy="write `for batch in recording.batches(loader):` in the training loop",
                )
            )
        if not self._writer.started:
            self._start()
        if self._kept is not None:
            moved = [batch for batch in self._now.skipped if batch.ran is not None and batch.ran.modes is not None]
            self._kept += [batch.content for batch in (*batches, *sorted(moved, key=lambda batch: batch.place))]
        self._taken = self._notes.note(self._count, batches, self._now.skipped)
        if self._count == 0:
            self._backwards.watch(self._params, self._taken.fields["without_grad"])

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._taken is not None
        self._steps.append(self._taken)
        self._taken, self._now = None, Gathered()
        self._count += 1
        if self._count % self._checkpoint_every == 0:
            assert self._writer is not None
            self._flush(self._capture() if self._writer.thinning.due(self._count) else None)

    def _flush(self, state: State | None) -> None:
        assert self._writer is not None
        if self._steps:
            self._writer.flush(self._notes.segment(self._steps), state, self._kept)
            self._steps = []
            self._kept = None if self._kept is None else []
        elif state is not None and state.step not in self._writer.thinning.kept:
            self._writer.keep(state)

    def _capture(self) -> State:
        random = RandomState.capture(self._device)
        return capture_state(
            self._count, self._params, live_buffers(self._plain, self._buffers), self._optimizer, random
        )

    def _start(self) -> None:
        """Write the manifest and the state before the first step, captured when the first batch was yielded."""
        assert self._writer is not None
        self._initial = self._initial or self._capture()
        manifest = describe_run(
            self._model,
            self._optimizer,
            self._notes.groups,
            self._modes.now(),
            self._sources.first,
            self._batch_leaves,
            self._reduction,
            self._checkpoint_every,
        )
        self._writer.start(manifest, self._initial)


def _refuse_closure(optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
        raise UnsupportedError(
            message(
                "optimizer.step was given a closure",
                expected="one gradient per step",
                cause=f"{type(optimizer).__name__} evaluates the loss inside the step",
                remedy="use an optimizer whose step() takes no closure",
            )
        )


@final
class RecordedBatches:
    """An iterable of the loader's own batches, each noted as it passes."""

    def __init__(self, recording: Recording, place: int, watched: Watched) -> None:
        self._recording, self._place, self._watched = recording, place, watched

    def __len__(self) -> int:
        return len(self._watched)

    def __iter__(self) -> Iterator[Any]:
        return self._recording._iterate(self._place, self._watched)
