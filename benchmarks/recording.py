"""What recording adds to training: `python -m benchmarks.recording`.

Two equal trainings in one process, one of them recorded, take turns of a hundred steps, which hold one checkpoint each.
Printed are medians over the turns: microseconds a step of the processor's time (of all threads) and of the clock, and
the median over pairs of neighbours of what the recorded turn took more.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hydragrad as hg
from benchmarks.workloads import LeNet5, fashion, loss

GOAL = 0.05
_STEPS, _BATCH = 100, 64


@dataclass(frozen=True)
class Training:
    """A loop to be recorded. ``recorded_data`` is what its loader reads while it is."""

    model: Callable[[], nn.Module]
    data: Dataset
    recorded_data: Dataset
    limit: float | None = None

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
        "BatchNorm, augmentation, dropout, clipping": Training(normalized, moved, hg.Augmented(moved), 1.0),
    }


def turn(training: Training, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Any, clip: Any) -> None:
    """A hundred steps."""
    for batch in batches:
        optimizer.zero_grad()
        loss(model, batch).mean().backward()
        if training.limit is not None:
            clip(model.parameters(), training.limit)
        optimizer.step()


def turns(training: Training, folder: Path, seconds: float) -> Iterator[dict[str, tuple[float, float]]]:
    """(processor's, clock's) seconds of neighbouring turns, plain and recorded."""
    models: dict[str, tuple[nn.Module, torch.optim.Optimizer]] = {}
    for name in ("plain", "recorded"):
        torch.manual_seed(0)
        model = training.model()
        models[name] = model, training.optimizer(model)
    loaders = {"plain": training.data, "recorded": training.recorded_data}
    loaders = {name: DataLoader(data, batch_size=_BATCH, shuffle=True) for name, data in loaders.items()}
    with hg.record(folder, *models["recorded"], reduction="mean") as recording:
        ends, names, count = time.monotonic() + seconds, ["plain", "recorded"], 0
        while count < 2 or time.monotonic() < ends:
            took = {}
            for name in names:
                batches = recording.batches(loaders[name]) if name == "recorded" else loaders[name]
                clip = recording.clip_grad_norm_ if name == "recorded" else nn.utils.clip_grad_norm_
                began = time.process_time(), time.perf_counter()
                turn(training, *models[name], batches, clip)
                took[name] = time.process_time() - began[0], time.perf_counter() - began[1]
            names.reverse()
            if count:  # the first turns warm up
                yield took
            count += 1


def overhead(training: Training, folder: Path, seconds: float) -> dict[str, float]:
    """Medians: microseconds a step, and what recording adds to them relatively."""
    pairs = list(turns(training, folder, seconds))
    found: dict[str, float] = {"turns": len(pairs)}
    for place, kind in enumerate(("processor", "clock")):
        for name in ("plain", "recorded"):
            found[f"{kind}_{name}_us"] = statistics.median(pair[name][place] for pair in pairs) / _STEPS * 1e6
        added = [pair["recorded"][place] / pair["plain"][place] - 1 for pair in pairs]
        found[f"{kind}_overhead"] = statistics.median(added)
    return found


def described(name: str, found: dict[str, float], threads: int) -> str:
    """In words."""
    lines = [f"recording, {name} ({found['turns']} pairs of {_STEPS} steps, {threads} threads)"]
    for kind in ("processor", "clock"):
        plain, recorded, more = (found[f"{kind}_{what}"] for what in ("plain_us", "recorded_us", "overhead"))
        added = f"{100 * more:+.1f} % (goal at most {100 * GOAL:.0f} %)"
        lines.append(f"  {kind:9} {plain:7.0f} us a step, recorded {recorded:7.0f}: {added}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="What recording adds to training.")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each training")
    parser.add_argument("--only", default="", help="trainings whose name holds this")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for name, training in trainings().items():
        if options.only in name:
            with tempfile.TemporaryDirectory() as folder:
                found = overhead(training, Path(folder) / "run", options.seconds)
            print(described(name, found, options.threads), flush=True)


if __name__ == "__main__":
    main()
