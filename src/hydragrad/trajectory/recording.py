"""Watching a torch training loop: batches through ``Recording.batches``, steps through the optimizer's hooks."""

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from hydragrad.amounts import Amount, bytes_of
from hydragrad.errors import HydragradError, StoreError, message
from hydragrad.files import path_of
from hydragrad.trajectory.claims import BackwardWatch, Gathered, PendingBatch, refuse_without_batch
from hydragrad.trajectory.clips import ClipNotes
from hydragrad.trajectory.describing import describe_run
from hydragrad.trajectory.digests import batch_digests, describe_batch
from hydragrad.trajectory.keeping import keep
from hydragrad.trajectory.noting import Noted, StepNotes
from hydragrad.trajectory.points import Point
from hydragrad.trajectory.randomness import RandomState, RandomWatch
from hydragrad.trajectory.resuming import Resumption, can_go_on, check_same, last_point, matching_point, put_back
from hydragrad.trajectory.segments import Segments
from hydragrad.trajectory.settings import Settings, check_model, refuse_closure
from hydragrad.trajectory.sources import Sources, Watched
from hydragrad.trajectory.sparing import digested
from hydragrad.trajectory.state import Manifest, State, capture_state, check_slots, live_buffers
from hydragrad.trajectory.store import Trajectory
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
    resume: bool = False,
    states: Mapping[str, Any] | None = None,
) -> "Recording":
    """Record a training loop into the folder ``path``; a context manager that changes none of the loop's numbers.

    ``reduction`` ("mean" or "sum") is an optional note of how the loop reduces a batch's losses; the full state is
    stored every ``checkpoint_every`` steps; ``checkpoint_bytes`` (bytes, or "1 GB"): what these states may take on disk
    together: a state that does not fit drops every second one and doubles the spacing; ``scaler``: the loop's
    torch.amp.GradScaler, whose scales are noted;
    ``keep_batches``: store the batches themselves, for data that cannot be made again. That costs their size on disk
    for every step (64 images of 3 x 32 x 32 floats: 0.8 MB a step), and memory for those of ``checkpoint_every`` steps.
    ``resume``: go on with the run in the folder if there is one whose process died (see ``restore``); ``states``: by
    name, other objects with state_dict and load_state_dict that going on takes (a scheduler), plain values only.
    Raises StoreError if the folder holds a run (unless ``overwrite`` or ``resume``), UnsupportedError for what cannot
    be recorded, MismatchError for another model, optimizer or data set than those of the run that is gone on with.

    Example::

        with hydragrad.record("runs/mnist", model, optimizer) as recording:
            for batch in recording.batches(loader):
                ...  # zero_grad, backward, step as ever
    """
    limit = None if checkpoint_bytes is None else bytes_of(checkpoint_bytes, "checkpoint_bytes")
    settings = Settings(
        path=path_of(path),
        reduction=reduction,
        checkpoint_every=checkpoint_every,
        thinning=Thinning(checkpoint_every, limit),
        overwrite=overwrite,
        resume=resume,
        scaler=scaler,
        keep_batches=keep_batches,
        states={**(states or {}), **({"scaler": scaler} if resume and scaler is not None else {})},
    )
    check_model(model)
    settings.check_optimizer(optimizer)
    return Recording(model, optimizer, settings)


@final
class Recording:
    """The context manager that ``record`` returns: see there."""

    def __init__(self, model: nn.Module, optimizer: Optimizer, given: Settings) -> None:
        self._model, self._optimizer, self._given = model, optimizer, given
        self._plain = plain = unwrapped(model)
        self._params: dict[str, Tensor] = dict(plain.named_parameters())
        self._buffers: dict[str, Tensor] = dict(plain.named_buffers())
        self._device = next((param.device for param in self._params.values()), torch.device("cpu"))
        self._modes = Modes(plain)
        self._watch = ModelWatch(model, plain, self._modes, self._device)
        self._backwards = BackwardWatch(self._backward_seen)
        self._sources = Sources(self._device, resumable=given.resume)
        self._clips = ClipNotes(self._params)
        self._notes = StepNotes(self._params, optimizer, self._modes, self._clips, given.used_scaler)
        self._random = RandomWatch(self._device)
        self._writer: StoreWriter | None = None
        self._segments: Segments | None = None
        self._open = contextlib.ExitStack()
        self._initial: State | None = None
        self._batch_leaves: list[dict[str, Any]] = []
        self._now = Gathered()
        self._taken: Noted | None = None  # between the hooks of one optimizer step
        self._count = 0
        self._begun: Trajectory | None = None  # the run to go on with, until it is known from which step
        self._recorded: Manifest | None = None  # of a run that is gone on with
        self._stepped = False
        self._due = 0 if given.resume else -1  # the step at whose state the loop's place is to be kept
        self._first: Point | None = None  # before the first step
        self._within = False  # between a batch and what follows it

    def __enter__(self) -> "Recording":
        given = self._given
        writer = StoreWriter(given.path, given.thinning, overwrite=given.overwrite, resume=given.resume)
        try:
            self._begun = can_go_on(given.path) if given.resume else None
        except BaseException:
            writer.close()
            raise
        self._writer = writer
        self._segments = Segments(writer, self._notes, self._device, keeps_batches=given.keep_batches)
        self._open.enter_context(self._watch.watching())
        self._open.callback(self._optimizer.register_step_pre_hook(self._before_step).remove)
        self._open.callback(self._optimizer.register_step_post_hook(self._after_step).remove)
        self._open.callback(self._backwards.stop)
        self._watch_backwards(frozenset())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()
        assert self._writer is not None
        try:
            if not self._writer.started and kind is None and self._begun is None:
                self._start()
            if self._writer.started:
                self._end(self._writer, kind, error)
        finally:
            self._writer.close()
            self._writer = self._segments = None

    def _end(self, writer: StoreWriter, kind: type[BaseException] | None, error: BaseException | None) -> None:
        """Write what is left and how the run ended; where that fails, what was written before stands, and is read."""
        assert self._segments is not None
        failed = self._segments.settle()
        self._end_batch()  # of a loop that was left by `break`
        pending = (*self._now.skipped, *self._now.batches)
        ran_on = any(batch.ran is not None and batch.ran.modes is not None for batch in pending)
        torn = self._taken is not None or (bool(self._now.batches) and bool(self._buffers)) or ran_on
        try:
            self._segments.end(None if torn else self._capture())
        except StoreError as refused:
            failed = failed or refused
        reason = (
            f"{kind.__name__}: {error}" if kind is not None else f"{type(failed).__name__}: {failed}" if failed else ""
        )
        leftover = [batch.ids.tolist() for batch in pending]
        try:
            moved = ran_on or self._watch.moved_since()
            writer.finish(complete=not reason, reason=reason, skipped=leftover, moved=moved)
        except StoreError as refused:
            failed = failed or refused
        if failed is not None and kind is None:
            raise failed

    def restore(self) -> Resumption:
        """Put model, optimizer, ``states`` and random generators back to the last stored state; where that is.

        With ``record(..., resume=True)``, before the first batch. The loop then begins with the pass it says; batches
        of it that were trained on are passed by. In a new run nothing is put back. Raises StoreError where the run does
        not say where its loop stood, MismatchError for another model or optimizer.

        Example::

            with hydragrad.record("runs/mnist", model, optimizer, resume=True) as recording:
                for epoch in range(recording.restore().epoch, 10):
                    for batch in recording.batches(loader):
                        ...
        """
        if self._writer is None or not self._given.resume or self._count:
            raise HydragradError(
                message(
                    "there is nothing to restore",
                    expected="the first thing inside `with hydragrad.record(..., resume=True) as recording:`",
                )
            )
        if self._begun is None:
            return Resumption()
        check_same(self._described(), self._begun.manifest, but=("collate", "data_length"))
        point = last_point(self._begun)
        state = self._begun.state(point.step)
        buffers = live_buffers(self._plain, self._buffers)
        put_back(point, state, self._params, buffers, self._optimizer, self._given.states)
        return self._go_on(self._begun, point, restored=True)

    def _settle(self, begun: Trajectory) -> None:
        """Find where model and optimizer stand in the run to go on with."""
        check_same(self._described(), begun.manifest, but=("collate", "data_length"))
        self._go_on(begun, matching_point(begun, self._capture()), restored=False)

    def _go_on(self, begun: Trajectory, point: Point, *, restored: bool) -> Resumption:
        assert self._writer is not None
        self._initial, self._recorded = begun.state(point.step), begun.manifest
        last = begun.steps[point.step - 1] if point.step else None
        given = {} if last is None else dict(zip(last.loaders, last.batches, strict=True))
        self._sources.go_on(point, given, restored=restored)
        dropped = self._writer.go_on(begun, point.step)
        self._begun, self._count, self._due = None, point.step, -1
        first = point.loaders[0] if point.loaders else None
        passes, taken = (first.passes, first.taken) if first is not None else (0, None)
        return Resumption(point.step, passes - (taken is not None), taken or 0, dropped)

    def batches(self, loader: Iterable[Any], indices: Iterable[Any] | None = None) -> "RecordedBatches":
        """Iterate ``loader`` (an ordinary DataLoader) and note which examples each batch holds.

        For anything else than a DataLoader give ``indices``: the ids of each batch, in the same order. The result has
        a length if ``loader`` has, and may be iterated once per epoch.
        """
        return RecordedBatches(self, self._sources.watch(loader, indices))

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

    def _iterate(self, watched: Watched) -> Iterator[Any]:
        if self._writer is None:
            raise HydragradError(
                message(
                    "this recording is not open", remedy="iterate inside `with hydragrad.record(...) as recording:`"
                )
            )
        self._end_batch()  # of another loader
        if self._begun is not None:
            self._settle(self._begun)
        place = self._sources.place(watched)
        self._keep_place(None)
        assert self._segments is not None
        self._segments.wait()  # a loader may fork its worker processes now: beside no thread of ours
        with contextlib.closing(self._sources.passing(place, watched)) as passing:
            for epoch, ids, batch in passing:
                self._initial = self._initial or self._capture()
                self._batch_leaves = self._batch_leaves or describe_batch(batch)
                digests = batch_digests(batch, len(ids)) if digested(self._count, epoch) else None
                pending = PendingBatch(ids, digests, epoch, place)
                if self._given.keep_batches:
                    pending.content = keep(batch)
                self._now.batches.append(pending)
                self._begin_batch()
                yield batch
                self._end_batch()
                self._keep_place(place)

    def _keep_place(self, asking: int | None) -> None:
        """Store where the loop stands, once it has done all that follows a step whose state was stored."""
        if self._due != self._count or self._now.batches or self._now.skipped or not self._sources.between(asking):
            return
        states = {name: one.state_dict() for name, one in self._given.states.items()}
        random = RandomState.capture(self._device)
        point = Point(self._count, self._notes.hyper(), random, self._sources.points(), states)
        self._due = -1
        assert self._writer is not None
        assert self._segments is not None
        if self._writer.started:
            self._segments.point(point)
        else:
            self._first = point

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

    def _watch_backwards(self, none: frozenset[str]) -> None:
        """By a parameter of the optimizer's, if one trains: the loop may leave gradients of others unzeroed."""
        held = {name: self._params[name] for names in self._notes.groups for name in names}
        trains = any(param.requires_grad and name not in none for name, param in held.items())
        self._backwards.watch(held if trains else self._params, none)

    def _backward_seen(self, fresh: bool) -> None:
        """A backward pass reached the parameters; ``fresh``: into gradients that had been zeroed before."""
        if fresh:
            self._now.zeroed()
        self._clips.backward(fresh)
        self._watch.backward_seen()
        self._random.complete()
        self._now.backwards += 1
        self._now.seen = len(self._now.batches)
        if self._now.batches:
            self._now.batches[-1].backward = True

    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._writer is not None
        refuse_closure(optimizer, args, kwargs)
        self._end_batch()
        batches = self._now.claim()
        if not batches:
            refuse_without_batch(self._sources.passing_now, self._stepped)
        if not self._stepped:
            if self._begun is not None:
                self._settle(self._begun)
            self._start()
        self._taken = self._notes.note(self._count, batches, self._now.skipped)
        if not self._stepped:
            self._watch_backwards(self._taken.without_grad)

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._taken is not None
        assert self._segments is not None
        if not self._stepped:
            check_slots(self._params, optimizer)
        self._segments.add(self._taken)
        self._taken, self._now, self._stepped = None, Gathered(), True
        self._count += 1
        ends = self._count % self._given.checkpoint_every == 0
        if ends and self._segments.begin(self._count, self._capture) and self._given.resume:
            self._due = self._count

    def _capture(self) -> State:
        random = RandomState.capture(self._device)
        return capture_state(
            self._count, self._params, live_buffers(self._plain, self._buffers), self._optimizer, random
        )

    def _start(self) -> None:
        """Write the manifest and the state before the first step, captured when the first batch was yielded."""
        assert self._writer is not None
        self._initial = self._initial or self._capture()
        if self._recorded is not None:
            check_same(self._described(), self._recorded)
            return
        self._writer.start(self._described(), self._initial)
        if self._first is not None:
            self._writer.point(self._first)

    def _described(self) -> Manifest:
        return describe_run(
            self._model,
            self._optimizer,
            self._notes.groups,
            self._modes.now(),
            self._sources.first,
            self._batch_leaves,
            self._given.reduction,
            self._given.checkpoint_every,
        )


@final
class RecordedBatches:
    """An iterable of the loader's own batches, each noted as it passes."""

    def __init__(self, recording: Recording, watched: Watched) -> None:
        self._recording, self._watched = recording, watched

    def __len__(self) -> int:
        return len(self._watched)

    def __iter__(self) -> Iterator[Any]:
        return self._recording._iterate(self._watched)
