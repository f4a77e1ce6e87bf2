"""A real training run, exactly: a residual network with BatchNorm, augmentation, dropout, clipping, a cosine schedule.

`python -m experiments.resnet` records it on CIFAR-10 images (the folder in HYDRAGRAD_DATA; the packaged Fashion-MNIST
without it) at a smooth setting (GELU, learning rate 0.01) and an unsmooth one (ReLU, 0.1), and prints whether it
replays bit for bit, the relative error of the exact scores against central differences of retraining along one random
direction of example weights (-1 or 1 each) by step, in float32, and the leave-one-out correlation, of really retrained
examples. ``--setting smooth`` runs one of them; ``--float64`` trains in double precision.
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

import hydragrad as hg
from hydragrad.retraining.measuring import losses_at
from hydragrad.tasks.digits import cross_entropy
from hydragrad.tasks.fashion import images as packaged

STEPS = (1e-3, 1e-2, 1e-1)
TRAIN, QUERIES, REMOVED, BATCH, EPOCHS, SEED = 1000, 20, 24, 50, 4, 0


@dataclass(frozen=True)
class Setting:
    """What makes a run smooth in its example weights, or not."""

    activation: Callable[[], nn.Module]
    lr: float


SETTINGS = {"smooth": Setting(nn.GELU, 0.01), "unsmooth": Setting(nn.ReLU, 0.1)}


class Block(nn.Module):
    """Two 3 x 3 convolutions with BatchNorm beside a shortcut."""

    def __init__(self, before: int, after: int, stride: int, activation: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), activation(),
            nn.Conv2d(after, after, 3, 1, 1, bias=False), nn.BatchNorm2d(after),
        )  # fmt: skip
        projected = nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.shortcut = nn.Identity() if before == after else projected
        self.activation = activation()

    def forward(self, images: Tensor) -> Tensor:
        return self.activation(self.body(images) + self.shortcut(images))


def network(channels: int, activation: Callable[[], nn.Module]) -> nn.Module:
    """Three blocks of 18, 36 and 72 channels, 98,500 parameters."""
    torch.manual_seed(SEED)
    return nn.Sequential(
        nn.Conv2d(channels, 18, 3, 2, 1, bias=False), nn.BatchNorm2d(18), activation(),
        Block(18, 18, 1, activation), Block(18, 36, 2, activation), Block(36, 72, 2, activation),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(72, 10),
    )  # fmt: skip


class Shifted(Dataset):
    """Images mirrored by chance and shifted by up to two pixels."""

    def __init__(self, data: TensorDataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        image, label = self.data[index]
        if torch.rand(()) < 0.5:
            image = image.flip(-1)
        size = image.shape[-1]
        down, right = torch.randint(0, 5, (2,)).tolist()
        return F.pad(image, (2, 2, 2, 2))[:, down : down + size, right : right + size], label


def sets() -> tuple[str, TensorDataset, TensorDataset]:
    """CIFAR-10 images where they are, else the packaged ones."""
    folders = [os.environ.get("HYDRAGRAD_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    file = next((p for f in folders if f and (p := Path(f) / "cifar10_6k.npz").is_file()), None)
    if file is None:
        train, test = packaged()
        return "Fashion-MNIST", TensorDataset(*train[:TRAIN]), TensorDataset(*test[:QUERIES])
    with np.load(file) as data:
        pixels, labels = (np.concatenate([data[f"{x}_train"][:TRAIN], data[f"{x}_test"][:QUERIES]]) for x in "xy")
    x = torch.tensor(pixels, dtype=torch.float32).permute(0, 3, 1, 2).contiguous() / 255
    y = torch.tensor(labels).long().flatten()
    return "CIFAR-10", TensorDataset(x[:TRAIN], y[:TRAIN]), TensorDataset(x[TRAIN:], y[TRAIN:])


def trained(folder: Path, setting: Setting, data: TensorDataset, dtype: torch.dtype) -> tuple[hg.Run, float]:
    """The recorded run, and the seconds that training took."""

    def build() -> nn.Module:
        return network(data[0][0].shape[0], setting.activation).to(dtype)

    def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
        return cross_entropy(model, (batch[0].to(dtype), batch[1]))

    model, shifted = build(), hg.Augmented(Shifted(data), SEED)
    loader = DataLoader(shifted, BATCH, shuffle=True, generator=torch.Generator().manual_seed(SEED))
    optimizer = torch.optim.SGD(model.parameters(), lr=setting.lr, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)
    began = time.perf_counter()
    with hg.record(folder, model, optimizer, reduction="mean") as recording:
        for _ in range(EPOCHS):
            for batch in recording.batches(loader):
                optimizer.zero_grad()
                loss(model, batch).mean().backward()
                recording.clip_grad_norm_(model.parameters(), 5.0)
                optimizer.step()
            schedule.step()
    seconds = time.perf_counter() - began
    return hg.load(folder, model=build(), loss=loss, data=shifted), seconds


def errors(run: hg.Run, scores: Tensor, queries: TensorDataset) -> dict[float, float]:
    """Relative error of the predicted change along one random direction, by step."""
    generator = torch.Generator().manual_seed(SEED)
    direction = torch.randint(0, 2, (run.num_examples,), generator=generator).to(scores.dtype) * 2 - 1
    predicted, found = direction @ scores, {}
    for h in STEPS:
        down, up = (losses_at(run, run.replay(weights=1 + sign * h * direction), queries) for sign in (-1, 1))
        measured = (down - up) / (2 * h)
        found[h] = float((measured - predicted).norm() / measured.norm())
    return found


def study(name: str, dtype: torch.dtype) -> dict[str, object]:
    source, data, queries = sets()
    with tempfile.TemporaryDirectory() as folder:
        run, seconds = trained(Path(folder) / "run", SETTINGS[name], data, dtype)
        verified = hg.verify(run)
        began = time.perf_counter()
        found = hg.attribute(run, queries)
        took = time.perf_counter() - began - found.diagnostics.check_seconds
        proof = hg.validate(run, found, queries, n=REMOVED, seed=SEED)
        row = {
            "setting": name,
            "data": source,
            "parameters": sum(p.numel() for p in run.problem.model.parameters()),
            "steps": run.num_steps,
            "exact replay": verified.exact,
            "sweep seconds per query, in trainings": took / seconds / QUERIES,
            "finite-difference error": {f"{h:g}": e for h, e in errors(run, found.values, queries).items()},
            "verdict": found.diagnostics.verdict,
            "growth": found.diagnostics.growth,
            "leave-one-out": proof.correlation.mean,
            "interval": [proof.correlation.low, proof.correlation.high],
            "plan": found.diagnostics.plan,
        }
        print(json.dumps(row, indent=2), flush=True)
        print(found.diagnostics, flush=True)
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description="A residual network with BatchNorm, recorded and attributed exactly.")
    parser.add_argument("--setting", choices=sorted(SETTINGS), action="append")
    parser.add_argument("--float64", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("bench-output/resnet.json"))
    given = parser.parse_args()
    dtype = torch.float64 if given.float64 else torch.float32
    rows = [study(name, dtype) for name in given.setting or SETTINGS]
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(rows, indent=2) + "\n")
    print("| setting | replay | error by step " + " / ".join(f"{h:g}" for h in STEPS) + " | leave-one-out | verdict |")
    print("|---|---|---|---|---|")
    for row in rows:
        found: dict[str, float] = row["finite-difference error"]  # type: ignore[assignment]
        print(
            f"| {row['setting']} | {'bit for bit' if row['exact replay'] else 'drifts'} | "
            f"{' / '.join(f'{e:.2g}' for e in found.values())} | {row['leave-one-out']:.2f} | {row['verdict']} |"
        )


if __name__ == "__main__":
    main()
