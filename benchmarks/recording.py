"""What recording adds to training: `python -m benchmarks.recording`.

Two equal trainings in one process, one of them recorded, take turns of ten steps, which of them first alternating. A
pair is a hundred steps of each, one checkpoint among them; it is written in the middle of a turn, so that what is
written beside the training counts as the recorded one's. Printed are medians over the pairs: microseconds a step of the
processor's time (of all threads) and of the clock, and what the recorded one took more, with a 95 % interval of that.
"""

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hydragrad as hg
from benchmarks.workloads import LeNet5, fashion, loss
from hydragrad.trajectory import loaders
from hydragrad.trajectory import recording as recorder
from hydragrad.trajectory.fingerprints import GradientFingerprint
from hydragrad.trajectory.noting import StepNotes
from hydragrad.trajectory.randomness import RandomWatch
from hydragrad.trajectory.segments import Segments

GOAL = 0.05
_STEPS, _TURN, _BATCH = 100, 10, 64


@dataclass(frozen=True)
class Training:
    """A loop to be recorded. ``recorded_data`` is what its loader reads while it is."""

    model: Callable[[], nn.Module]
    data: Dataset
    recorded_data: Dataset
    limit: float | None = None
    decay: float | None = None

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


class Shifted(Dataset):
    """Images moved by up to two pixels and mirrored, at random."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[index]
        down, right, mirrored = torch.randint(0, 5, (3,)).tolist()
        image = F.pad(image, (2, 2, 2, 2))[:, down : down + 28, right : right + 28]
        return image.flip(-1) if mirrored > 2 else image, label


def normalized() -> nn.Module:
    """Convolutions with BatchNorm, and dropout."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 49, 64), nn.ReLU(), nn.Dropout(0.3), nn.Linear(64, 10),
    )  # fmt: skip


def trainings() -> dict[str, Training]:
    """By name; nothing where Fashion-MNIST is absent."""
    workload = fashion(_STEPS * _BATCH, 1)
    if workload is None:
        return {}
    data: TensorDataset = workload.train
    moved = Shifted(data)
    return {
        "LeNet-5": Training(LeNet5, data, data),
        "BatchNorm, dropout, augmentation, clipping, schedule": Training(
            normalized, moved, hg.Augmented(moved), limit=1.0, decay=0.9999
        ),
        "the same, both trainings on augmented data": Training(
            normalized, hg.Augmented(moved), hg.Augmented(moved), limit=1.0, decay=0.9999
        ),
    }


def steps(training: Training, recording: hg.Recording | None, model: nn.Module, optimizer: Any) -> Iterator[None]:
    """The loop, epoch after epoch; goes on from step to step as it is asked."""
    data = training.data if recording is None else training.recorded_data
    loader = DataLoader(data, batch_size=_BATCH, shuffle=True)
    clip = nn.utils.clip_grad_norm_ if recording is None else recording.clip_grad_norm_
    schedule = None if training.decay is None else torch.optim.lr_scheduler.ExponentialLR(optimizer, training.decay)
    while True:
        for batch in loader if recording is None else recording.batches(loader):
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            if training.limit is not None:
                clip(model.parameters(), training.limit)
            optimizer.step()
            if schedule is not None:
                schedule.step()  # the rate changes at every step
            yield


def pairs(training: Training, folder: Path, seconds: float) -> Iterator[dict[str, tuple[float, float]]]:
    """(processor's, clock's) seconds of a hundred steps, plain and recorded."""
    made = {}
    for name in ("plain", "recorded"):
        torch.manual_seed(0)
        model = training.model()
        made[name] = model, training.optimizer(model)
    with hg.record(folder, *made["recorded"], reduction="mean", checkpoint_every=_STEPS) as recording:
        loops = {name: steps(training, recording if name == "recorded" else None, *made[name]) for name in made}
        for loop in loops.values():  # warms up; the checkpoint then comes in the middle of a turn
            list(islice(loop, _STEPS + _TURN // 2))
        ends, names, count = time.monotonic() + seconds, list(made), 0
        while count < 2 or time.monotonic() < ends:
            took = dict.fromkeys(made, (0.0, 0.0))
            for _ in range(_STEPS // _TURN):
                for name in names:
                    began = time.process_time(), time.perf_counter()
                    list(islice(loops[name], _TURN))
                    spent, passed = time.process_time() - began[0], time.perf_counter() - began[1]
                    took[name] = took[name][0] + spent, took[name][1] + passed
                names.reverse()
            yield took
            count += 1
        for loop in loops.values():
            loop.close()  # type: ignore[attr-defined]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Of the median, 95 %, from the order of the values alone."""
    ordered, count = sorted(values), len(values)
    apart = 0.98 * count**0.5
    return ordered[max(0, int(count / 2 - apart))], ordered[min(count - 1, int(count / 2 + apart))]


def overhead(training: Training, folder: Path, seconds: float) -> dict[str, Any]:
    """Medians: microseconds a step, and what recording adds to them relatively."""
    measured = list(pairs(training, folder, seconds))
    found: dict[str, Any] = {"pairs": len(measured)}
    for place, kind in enumerate(("processor", "clock")):
        for name in ("plain", "recorded"):
            found[f"{kind}_{name}_us"] = statistics.median(pair[name][place] for pair in measured) / _STEPS * 1e6
        added = [pair["recorded"][place] / pair["plain"][place] - 1 for pair in measured]
        found[f"{kind}_overhead"], found[f"{kind}_interval"] = statistics.median(added), interval(added)
    return found


def parts(training: Training, folder: Path, count: int = 1000) -> dict[str, float]:
    """Medians of the time inside each part of recording where it stands, microseconds a call, by name.

    That counts the reading of the clock, and not what a part pushes out of the cache.
    """
    took: dict[str, list[int]] = {}

    def timed(owner: Any, name: str, label: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter_ns()
            try:
                return real(*args, **kwargs)
            finally:
                took.setdefault(label, []).append(time.perf_counter_ns() - began)

        patches.enter_context(mock.patch.object(owner, name, call))

    torch.manual_seed(0)
    model = training.model()
    optimizer = training.optimizer(model)
    with contextlib.ExitStack() as patches, hg.record(folder, model, optimizer, checkpoint_every=_STEPS) as recording:
        timed(recorder, "batch_digests", "digests of the batch")
        timed(GradientFingerprint, "read", "fingerprint of the gradient")
        timed(RandomWatch, "begin", "random generators, before")
        timed(RandomWatch, "end", "random generators, after")
        timed(StepNotes, "note", "all notes of a step, the fingerprint among them")
        timed(loaders, "as_ids", "ids of the batch")
        timed(Segments, "begin", "at a checkpoint: the state copied")
        timed(Segments, "_write", "at a checkpoint: written beside the training")
        list(islice(loop := steps(training, recording, model, optimizer), count))
        loop.close()  # type: ignore[attr-defined]
    return {label: statistics.median(times) / 1e3 for label, times in took.items()}


def described(name: str, found: dict[str, Any], threads: int) -> str:
    """In words."""
    lines = [f"recording, {name} ({found['pairs']} pairs of {_STEPS} steps, {threads} threads)"]
    for kind in ("processor", "clock"):
        plain, recorded, more = (found[f"{kind}_{what}"] for what in ("plain_us", "recorded_us", "overhead"))
        low, high = found[f"{kind}_interval"]
        added = f"{100 * more:+.1f} % ({100 * low:+.1f} to {100 * high:+.1f}; goal at most {100 * GOAL:.0f})"
        lines.append(f"  {kind:9} {plain:7.0f} us a step, recorded {recorded:7.0f}: {added}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What recording adds to training.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each training")
    parser.add_argument("--parts", action="store_true", help="the time inside each part, in place of the whole")
    parser.add_argument("--only", default="", help="trainings whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, training in trainings().items():
        if options.only in name:
            with tempfile.TemporaryDirectory() as folder:
                if options.parts:
                    print(f"recording, {name}, microseconds a call ({options.threads} threads)")
                    for label, time_taken in parts(training, Path(folder) / "run").items():
                        print(f"  {label:50} {time_taken:8.1f}", flush=True)
                    continue
                found = overhead(training, Path(folder) / "run", options.seconds)
            print(described(name, found, options.threads), flush=True)


if __name__ == "__main__":
    main()
