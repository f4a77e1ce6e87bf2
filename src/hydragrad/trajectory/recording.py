"""Watching a torch training loop: batches through ``Recording.batches``, steps through the optimizer's hooks."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from hydragrad.errors import HydragradError, MismatchError, UnsupportedError, message
from hydragrad.trajectory.claims import BackwardWatch, Gathered, PendingBatch
from hydragrad.trajectory.clips import ClipNotes
from hydragrad.trajectory.fingerprints import GradientFingerprint, batch_digests, describe_batch
from hydragrad.trajectory.format import VERSION
from hydragrad.trajectory.loaders import WatchedBatches, WatchedLoader
from hydragrad.trajectory.optimizers import group_names, hyperparameters
from hydragrad.trajectory.randomness import DrawWriter, RandomState, RandomWatch
from hydragrad.trajectory.state import Hyper, Manifest, State, StepRecord, capture_state
from hydragrad.trajectory.writer import StoreWriter


def record(
    path: str | Path,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    reduction: str | None = None,
    checkpoint_every: int = 100,
    overwrite: bool = False,
) -> "Recording":
    """Record a training loop into the folder ``path``; a context manager that changes none of the loop's numbers.

    ``reduction`` ("mean" or "sum") is an optional note of how the loop reduces a batch's losses; the full state is
    stored every ``checkpoint_every`` steps. Raises StoreError if the folder holds a run (unless ``overwrite``),
    UnsupportedError for what cannot be recorded.

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
    return Recording(Path(path), model, optimizer, reduction, checkpoint_every, overwrite)


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
    ) -> None:
        self._path, self._model, self._optimizer = path, model, optimizer
        self._reduction, self._checkpoint_every, self._overwrite = reduction, checkpoint_every, overwrite
        self._params: dict[str, Tensor] = dict(model.named_parameters())
        self._buffers: dict[str, Tensor] = dict(model.named_buffers())
        self._modules: dict[str, nn.Module] = dict(model.named_modules())
        self._group_names = group_names(self._params, optimizer)
        self._device = next((param.device for param in self._params.values()), torch.device("cpu"))
        self._fingerprint = GradientFingerprint([param.numel() for param in self._params.values()])
        self._writer: StoreWriter | None = None
        self._handles: list[Any] = []
        self._backwards = BackwardWatch(self._backward_seen)
        self._loaders: list[tuple[Any, WatchedLoader | WatchedBatches]] = []
        self._passes: list[int] = []
        self._initial: State | None = None
        self._batch_leaves: list[dict[str, Any]] = []
        self._now = Gathered()
        self._clips = ClipNotes(self._params)
        self._random, self._draws = RandomWatch(self._device), DrawWriter()
        self._last_groups: tuple[Hyper, ...] = ()
        self._last_modes: tuple[list[bool], dict[str, bool]] = ([], {})
        self._last_none: frozenset[str] = frozenset()
        self._taken: StepRecord | None = None  # between the hooks of one optimizer step
        self._steps: list[StepRecord] = []
        self._count = 0

    def __enter__(self) -> "Recording":
        self._writer = StoreWriter(self._path, overwrite=self._overwrite)
        self._handles = [
            self._optimizer.register_step_pre_hook(self._before_step),
            self._optimizer.register_step_post_hook(self._after_step),
        ]
        self._backwards.watch(self._params, frozenset())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._backwards.stop()
        assert self._writer is not None
        try:
            if not self._writer.started and kind is None:
                self._start()
            if self._writer.started:
                torn = self._taken is not None or (bool(self._now.batches) and bool(self._buffers))
                self._flush(None if torn else self._capture())
                reason = "" if kind is None else f"{kind.__name__}: {error}"
                leftover = [*self._now.skipped, *(batch.ids for batch in self._now.batches)]
                self._writer.finish(complete=kind is None, reason=reason, skipped=[ids.tolist() for ids in leftover])
        finally:
            self._writer.close()
            self._writer = None

    def batches(self, loader: Iterable[Any], indices: Iterable[Any] | None = None) -> "RecordedBatches":
        """Iterate ``loader`` (an ordinary DataLoader) and note which examples each batch holds.

        For anything else than a DataLoader give ``indices``: the ids of each batch, in the same order. The result has
        a length if ``loader`` has, and may be iterated once per epoch.
        """
        for place, (known, watched) in enumerate(self._loaders):
            if known is loader and indices is None:
                return RecordedBatches(self, place, watched)
        if indices is not None:
            watched = WatchedBatches(loader, indices)
        elif isinstance(loader, DataLoader):
            watched = WatchedLoader(loader)
        else:
            raise UnsupportedError(
                message(
                    "the ids of these batches are unknown",
                    expected="a torch DataLoader",
                    got=type(loader).__name__,
                    remedy="recording.batches(iterable, indices=[[ids of batch 0], [ids of batch 1], ...])",
                )
            )
        return RecordedBatches(self, self._place(loader, watched), watched)

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

    def _place(self, loader: Any, watched: WatchedLoader | WatchedBatches) -> int:
        """The number of a loader; batches with ids given by hand all count as one, whose passes are epochs."""
        by_hand = isinstance(watched, WatchedBatches)
        for place, (_, known) in enumerate(self._loaders):
            if by_hand and isinstance(known, WatchedBatches):
                return place
            if not by_hand and isinstance(known, WatchedLoader) and known.data is not watched.data:
                raise UnsupportedError(
                    message(
                        "loaders of different data sets in one recording",
                        expected="one data set, so that an id means one example",
                        got=f"{type(known.data).__name__} of {known.length}, {type(watched.data).__name__} "
                        f"of {watched.length}",
                        remedy="let both loaders sample from one data set (ConcatDataset and samplers)",
                    )
                )
        self._loaders.append((loader, watched))
        self._passes.append(0)
        return len(self._loaders) - 1

    def _iterate(self, place: int, watched: WatchedLoader | WatchedBatches) -> Iterator[Any]:
        if self._writer is None:
            raise HydragradError(
                message(
                    "this recording is not open", remedy="iterate inside `with hydragrad.record(...) as recording:`"
                )
            )
        epoch = self._passes[place]
        self._passes[place] += 1
        for ids, batch in watched:
            if self._initial is None:
                self._initial, self._batch_leaves = self._capture(), describe_batch(batch)
            self._now.batches.append(PendingBatch(ids, batch_digests(batch, len(ids)), epoch, place))
            self._random.begin()
            yield batch
            self._end_batch()

    def _end_batch(self) -> None:
        """The loop went on from the last yielded batch: to its step, or to the next batch."""
        drawn = self._random.end()
        if drawn is not None and self._now.batches:
            self._now.batches[-1].drawn = drawn

    def _backward_seen(self, fresh: bool) -> None:
        """A backward pass reached the parameters; ``fresh``: into gradients that had been zeroed before."""
        if fresh:
            self._now.zeroed()
        self._clips.backward(fresh)
        self._now.backwards += 1
        self._now.seen = len(self._now.batches)
        if self._now.batches:
            self._now.batches[-1].backward = True

    @torch.no_grad()
    def _before_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._writer is not None
        if (len(args) > 1 and args[1] is not None) or kwargs.get("closure") is not None:
            raise UnsupportedError(
                message(
                    "optimizer.step was given a closure",
                    expected="one gradient per step",
                    cause=f"{type(optimizer).__name__} evaluates the loss inside the step",
                    remedy="use an optimizer whose step() takes no closure",
                )
            )
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
        grads = [param.grad for param in self._params.values()]
        none = frozenset(name for name, grad in zip(self._params, grads, strict=True) if grad is None)
        if none != self._last_none:
            self._last_none = none
        if self._count == 0:
            self._backwards.watch(self._params, none)
        self._taken = StepRecord(
            index=self._count,
            epoch=batches[0].epoch,
            batches=tuple(batch.ids for batch in batches),
            digests=tuple(batch.digests for batch in batches),
            groups=self._groups(),
            without_grad=self._last_none,
            fingerprint=self._fingerprint(grads),
            modes=self._modes(),
            epochs=tuple(batch.epoch for batch in batches),
            loaders=tuple(batch.loader for batch in batches),
            skipped=tuple(self._now.skipped),
            draws=tuple(self._draws.draw(batch.drawn) for batch in batches),
            clips=self._clips.take(),
        )

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        assert self._taken is not None
        self._steps.append(self._taken)
        self._taken, self._now = None, Gathered()
        self._count += 1
        if self._count % self._checkpoint_every == 0:
            self._flush(self._capture())

    def _flush(self, state: State | None) -> None:
        assert self._writer is not None
        if self._steps:
            self._writer.flush(self._steps, state)
            self._steps = []
            self._draws.forget()

    def _capture(self) -> State:
        random = RandomState.capture(self._device)
        return capture_state(self._count, self._params, self._buffers, self._optimizer, random)

    def _groups(self) -> tuple[Hyper, ...]:
        groups = hyperparameters(self._optimizer, self._group_names)
        if groups != self._last_groups:
            self._last_groups = groups
        return self._last_groups

    def _modes(self) -> dict[str, bool]:
        training = [module.training for module in self._modules.values()]
        if training != self._last_modes[0]:
            self._last_modes = (training, dict(zip(self._modules, training, strict=True)))
        return self._last_modes[1]

    def _start(self) -> None:
        """Write the manifest and the state before the first step, captured when the first batch was yielded."""
        assert self._writer is not None
        watched = self._loaders[0][1] if self._loaders else None
        collate = (
            {"mode": watched.mode, **watched.collate} if watched is not None else {"mode": "samples", "default": True}
        )
        manifest = Manifest(
            version=VERSION,
            torch=torch.__version__,
            params={name: {**_spec(p), "requires_grad": p.requires_grad} for name, p in self._params.items()},
            buffers={name: _spec(buffer) for name, buffer in self._buffers.items()},
            optimizer={
                "class": type(self._optimizer).__name__,
                "module": type(self._optimizer).__module__,
                "groups": self._group_names,
            },
            modes=dict(self._modes()),
            data_length=watched.length if watched is not None else None,
            collate=collate,
            batch=self._batch_leaves,
            reduction=self._reduction,
            checkpoint_every=self._checkpoint_every,
            device=str(self._device),
        )
        self._writer.start(manifest, self._initial or self._capture())
        self._initial = self._initial or self._capture()


@final
class RecordedBatches:
    """An iterable of the loader's own batches, each noted as it passes."""

    def __init__(self, recording: Recording, place: int, watched: WatchedLoader | WatchedBatches) -> None:
        self._recording, self._place, self._watched = recording, place, watched

    def __len__(self) -> int:
        return len(self._watched)

    def __iter__(self) -> Iterator[Any]:
        return self._recording._iterate(self._place, self._watched)


def _spec(tensor: Tensor) -> dict[str, Any]:
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
