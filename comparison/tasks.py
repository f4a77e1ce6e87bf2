"""The training runs that are compared: data, model, optimizer, and how much is retrained to judge."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import TensorDataset

import hydragrad as hg
from comparison.exchange import About, write_folder
from comparison.models import LOSSES, MODELS, OPTIMIZERS
from hydragrad.tasks.digits import digits as digits_task
from hydragrad.tasks.digits import flip_labels

Sets = tuple[TensorDataset, TensorDataset]


@dataclass(frozen=True)
class Spec:
    """A task by its names in `comparison.models`.

    `sets(queries)`: training data and queries, None where the data is absent; `removed`: examples left out one by one
    (0: nothing is retrained, cost alone is measured); `subsets`: retrained per fraction for LDS; `classes`: 0 where
    labels cannot be flipped.
    """

    name: str
    model: str
    loss: str
    optimizer: str
    options: dict[str, Any]
    batch_size: int
    epochs: int
    sets: Callable[[int], Sets | None]
    classes: int
    queries: int = 40
    removed: int = 40
    subsets: int = 32
    dtype: str = "float32"

    def record(self, folder: Path, seed: int, flipped: bool) -> bool:
        """Train, record, write the exchange folder; False where the data is absent or labels cannot be flipped."""
        sets = self.sets(self.queries)
        if sets is None or (flipped and not self.classes):
            return False
        train, queries = sets
        if flipped:
            inputs, labels = train.tensors
            given, ids = flip_labels(labels, 0.1, self.classes, seed)
            train = TensorDataset(inputs, given)
            folder.mkdir(parents=True, exist_ok=True)
            np.save(folder / "flipped.npy", ids.numpy())
        task = hg.Task(
            self.name,
            model=lambda: MODELS[self.model]().to(getattr(torch, self.dtype)),
            loss=LOSSES[self.loss],
            train=train,
            test=queries,
            optimizer=lambda model: OPTIMIZERS[self.optimizer](model.parameters(), **self.options),
            batch_size=self.batch_size,
            epochs=self.epochs,
            seed=seed,
        )
        an_epoch = -(-len(train) // self.batch_size)
        every = an_epoch * -(-self.epochs // 10)  # at most ten states, each at an epoch's end
        run = hg.train(task, folder / "run", overwrite=True, checkpoint_every=every)
        about = About(
            self.name, self.model, self.loss, self.optimizer, self.options, self.batch_size, self.epochs, seed,
            self.classes, list(run.trajectory.checkpoints), self.dtype,
        )  # fmt: skip
        states = {step: run.trajectory.state(step) for step in run.trajectory.checkpoints}
        tensors = {step: state.params | state.buffers for step, state in states.items()}
        write_folder(folder, about, train, queries, [step.batches[0] for step in run.steps], tensors)
        return True


def _digits(queries: int) -> Sets:
    task = digits_task(test_size=queries)
    return task.train, task.test


def _breast_cancer(queries: int) -> Sets:
    from sklearn.datasets import load_breast_cancer

    found: Any = load_breast_cancer()
    order = np.random.default_rng(0).permutation(len(found.target))
    points, labels = found.data[order], found.target[order]
    n = 455
    points = (points - points[:n].mean(0)) / points[:n].std(0)
    x, y = torch.tensor(points, dtype=torch.float64), torch.tensor(labels, dtype=torch.int64)
    return TensorDataset(x[:n], y[:n]), TensorDataset(x[n : n + queries], y[n : n + queries])


def _images(file: str, examples: int) -> Callable[[int], Sets | None]:
    def sets(queries: int) -> Sets | None:
        path = _place(file)
        if path is None:
            return None
        with np.load(path) as data:
            kept = [data[name][:n] for name, n in (("x_train", examples), ("x_test", queries))]
            labels = [data[name][:n] for name, n in (("y_train", examples), ("y_test", queries))]
        made = []
        for x, y in zip(kept, labels, strict=True):
            pixels = torch.tensor(x, dtype=torch.float32) / 255
            pixels = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2).contiguous()
            made.append(TensorDataset(pixels, torch.tensor(y).long().flatten()))
        return made[0], made[1]

    return sets


def _moby_dick(queries: int) -> Sets | None:
    path = _place("moby_dick.txt")
    if path is None:
        return None
    text = path.read_text(encoding="utf-8", errors="ignore")[30_000:230_000]  # past the front matter
    known = {c: i for i, (c, _) in enumerate(_frequent(text, 63), start=1)}  # 0: any other
    tokens = torch.tensor([known.get(c, 0) for c in text])
    count, length = 512, 32
    starts = torch.arange(count + queries) * (len(tokens) - length - 1) // (count + queries)
    rows = torch.stack([tokens[s : s + length + 1] for s in starts.tolist()])
    mixed = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    sets = [TensorDataset(part[:, :-1].contiguous(), part[:, 1:].contiguous()) for part in mixed.split(count)]
    return sets[0], sets[1]


def _frequent(text: str, most: int) -> list[tuple[str, int]]:
    counts = {c: text.count(c) for c in set(text)}
    return sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))[:most]


def _place(name: str) -> Path | None:
    folders = [os.environ.get("HYDRAGRAD_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    return next((Path(f) / name for f in folders if f and (Path(f) / name).is_file()), None)


_SGD = {"lr": 0.1, "momentum": 0.9}
TASKS = {
    spec.name: spec
    for spec in (
        Spec("digits-sgd", "mlp", "classification", "sgd", _SGD, 64, 15, _digits, 10),
        Spec(
            "digits-sgd-360", "mlp", "classification", "sgd", _SGD, 64, 15, _digits, 0,
            queries=360, removed=0, subsets=0,
        ),
        Spec("digits-adamw", "mlp", "classification", "adamw", {"lr": 1e-3, "weight_decay": 0.01}, 64, 15, _digits, 10),
        Spec(
            "breast-cancer", "logistic", "classification", "sgd", {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01},
            65, 30, _breast_cancer, 2,
            dtype="float64",  # single examples change the losses by as little as float32 rounds them
        ),
        Spec(
            "fashion-lenet", "lenet", "classification", "sgd", {"lr": 0.02, "momentum": 0.9}, 64, 5,
            _images("fashion_mnist.npz", 2000), 10, removed=24, subsets=16,
        ),
        Spec(
            "fashion-lenet-tanh", "lenet-tanh", "classification", "sgd", {"lr": 0.02, "momentum": 0.9}, 64, 5,
            _images("fashion_mnist.npz", 2000), 10, removed=24, subsets=16,
        ),
        Spec(
            "cifar-batchnorm", "batchnorm-cnn", "classification", "sgd", {"lr": 0.01, "momentum": 0.9}, 64, 5,
            _images("cifar10_6k.npz", 1000), 10, removed=24, subsets=16,
        ),
        Spec(
            "moby-transformer", "transformer", "next-character", "adamw", {"lr": 3e-3, "weight_decay": 0.01}, 32, 8,
            _moby_dick, 0, removed=24, subsets=16,
        ),
    )
}  # fmt: skip
