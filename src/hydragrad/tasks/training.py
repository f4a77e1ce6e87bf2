"""An ordinary training loop, recorded."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from hydragrad.errors import HydragradError, MismatchError, message
from hydragrad.files import path_of
from hydragrad.problem import Problem, Reduction
from hydragrad.run import Run, kept_random_state
from hydragrad.tasks.task import Task
from hydragrad.trajectory.batches import to_device
from hydragrad.trajectory.digests import describe_batch
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.resuming import Resumption


def train(
    task: Task,
    path: str | Path,
    *,
    overwrite: bool = False,
    resume: bool = False,
    checkpoint_every: int = 100,
    progress: bool = False,
) -> Run:
    """Train ``task`` by an ordinary loop, recorded into the folder ``path``, and load the recorded run.

    The same task gives the same run, bit for bit, on the same machine; torch's random state stays as it was.
    ``resume``: go on with a run in ``path`` whose process was killed (at its last stored state), and end as that would
    have; where there is none, begin. ``checkpoint_every``: steps between stored states; ``progress``: show a bar.
    Raises StoreError if ``path`` holds a run (unless ``overwrite`` or ``resume``), or a finished one (``resume``).

    Example: ``run = hydragrad.train(task, "runs/digits")``.
    """
    if not isinstance(task, Task):
        raise MismatchError(message("there is no task to train", expected="a hydragrad.Task", got=repr(task)[:80]))
    if not len(task.train):
        raise MismatchError(message(f"task {task.name!r} has no training examples", expected="at least one"))
    with kept_random_state():
        torch.manual_seed(task.seed)
        model = task.model()
        optimizer = task.optimize(model)
        _loop(task, path_of(path), model, optimizer, overwrite, resume, checkpoint_every, progress)
    return task.load(path)


def loader_of(task: Task) -> DataLoader[Any]:
    """The shuffled loader of a task's training data, the same order at every call."""
    return DataLoader(
        task.train,
        batch_size=task.batch_size,
        shuffle=True,
        collate_fn=task.collate_fn,
        generator=torch.Generator().manual_seed(task.seed),
    )


def _loop(
    task: Task,
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    overwrite: bool,
    resume: bool,
    checkpoint_every: int,
    progress: bool,
) -> None:
    scheduler = task.scheduler(optimizer) if task.scheduler else None
    reduction, loader = Reduction(task.reduction), loader_of(task)
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    model.train()
    recording = record(
        path,
        model,
        optimizer,
        reduction=reduction.name,
        checkpoint_every=checkpoint_every,
        overwrite=overwrite,
        resume=resume,
        states={"scheduler": scheduler} if resume and scheduler else {},
    )
    bar = tqdm(total=task.epochs * len(loader), desc="training", unit="step", delay=2, disable=not progress)
    with bar, recording:
        begun = recording.restore() if resume else Resumption()
        bar.update(begun.step)
        for epoch in range(begun.epoch, task.epochs):
            first = begun.batch if epoch == begun.epoch else 0
            for place, batch in enumerate(recording.batches(loader), start=first):
                examples = min(task.batch_size, len(task.train) - place * task.batch_size)
                batch = to_device(batch, device)
                optimizer.zero_grad()
                with _taking(task, batch):
                    losses = Problem.checked(task.loss(model, batch), examples)
                reduction.scalar(batch, losses, None).backward()
                optimizer.step()
                bar.update()
            if scheduler:
                scheduler.step()


@contextlib.contextmanager
def _taking(task: Task, batch: Any) -> Iterator[None]:
    """Turn an error of the user's model or loss on a batch into a MismatchError that says what was in it."""
    try:
        yield
    except (HydragradError, torch.OutOfMemoryError, MemoryError):
        raise
    except Exception as error:
        parts = [f"{part['path'] or 'input'}: {part['dtype']} {part['shape']} each" for part in describe_batch(batch)]
        raise MismatchError(
            message(
                f"the model and the loss of task {task.name!r} do not take its training data",
                expected="loss(model, batch) -> one number for each example",
                got=f"{type(error).__name__}: {str(error)[:300].rstrip('.')}; the batch holds {', '.join(parts)}",
                cause="samples of another shape or dtype than the model's, labels beyond its classes or of another "
                "dtype, or an error in the loss",
                remedy="call loss(model, batch) on a batch of the data by hand",
            )
        ) from error
