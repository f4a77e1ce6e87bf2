"""The runs that are measured: digits with an MLP, Fashion-MNIST with LeNet-5, CIFAR-10 with batch normalization."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hydragrad as hg


def loss(model: nn.Module, batch: list[Tensor]) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


@dataclass(frozen=True)
class Workload:
    """A training run to be measured: everything seeded, batches fixed."""

    name: str
    build: Callable[[], nn.Module]
    train: TensorDataset
    test: TensorDataset
    lr: float
    momentum: float
    epochs: int
    batch: int = 64

    def batches(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(0)
        order = [torch.randperm(len(self.train), generator=generator) for _ in range(self.epochs)]
        return [ids.tolist() for permutation in order for ids in permutation.split(self.batch)]

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.build()

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(model.parameters(), lr=self.lr, momentum=self.momentum)

    def collated(self) -> list[list[Tensor]]:
        return [[tensor[ids] for tensor in self.train.tensors] for ids in self.batches()]

    def plain(self, collated: list[list[Tensor]]) -> nn.Module:
        """The training loop by itself, on tensors collated beforehand: the unit of every ratio."""
        model = self.model()
        optimizer = self.optimizer(model)
        for batch in collated:
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()
        return model

    def recorded(self, path: Path) -> hg.Run:
        model = self.model()
        optimizer = self.optimizer(model)
        with hg.record(path, model, optimizer, reduction="mean", overwrite=True) as recording:
            for batch in recording.batches(self.collated(), indices=self.batches()):
                optimizer.zero_grad()
                loss(model, batch).mean().backward()
                optimizer.step()
        return hg.load(path, model=model, loss=loss, data=self.train)


class LeNet5(nn.Module):
    """LeNet-5 as commonly trained today: ReLU, max pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)
        )
        self.classifier = nn.Sequential(
            nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.features(images))


def digits(epochs: int = 15) -> Workload:
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    x = torch.tensor(images[order] / 16, dtype=torch.float32)
    y = torch.tensor(labels[order])
    n = len(y) - 360

    def mlp() -> nn.Module:
        return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 10))

    return Workload("digits", mlp, TensorDataset(x[:n], y[:n]), TensorDataset(x[n:], y[n:]), 0.1, 0.9, epochs)


def fashion(examples: int = 4000, epochs: int = 2) -> Workload | None:
    """LeNet-5 on Fashion-MNIST; None where the data is absent (set HYDRAGRAD_DATA to its folder)."""
    file = next((f for f in _places("fashion_mnist.npz") if f.is_file()), None)
    if file is None:
        return None
    with np.load(file) as data:
        x, y = data["x_train"], data["y_train"]
        x_test, y_test = data["x_test"][:1000], data["y_test"][:1000]
    keep = np.arange(examples) % len(y)

    def tensors(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
        return TensorDataset(torch.tensor(images[:, None] / 255, dtype=torch.float32), torch.tensor(labels).long())

    return Workload("fashion", LeNet5, tensors(x[keep], y[keep]), tensors(x_test, y_test), 0.05, 0.9, epochs)


def batch_normed() -> nn.Module:
    """Three convolutions with batch normalization and GELU, 34,346 parameters."""

    def stage(inward: int, outward: int) -> list[nn.Module]:
        convolution = nn.Conv2d(inward, outward, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outward), nn.GELU(), nn.AvgPool2d(2)]

    return nn.Sequential(*stage(3, 16), *stage(16, 32), *stage(32, 64), nn.Flatten(), nn.Linear(64 * 16, 10))


def cifar(examples: int = 1280, epochs: int = 1) -> Workload | None:
    """The network with batch normalization on CIFAR-10; None where the data is absent."""
    file = next((f for f in _places("cifar10_6k.npz") if f.is_file()), None)
    if file is None:
        return None
    with np.load(file) as data:
        x, y = data["x_train"][:examples], data["y_train"][:examples]
        x_test, y_test = data["x_test"], data["y_test"]

    def tensors(images: np.ndarray, labels: np.ndarray) -> TensorDataset:
        return TensorDataset(
            torch.tensor(images, dtype=torch.float32).permute(0, 3, 1, 2).div(255).contiguous(),
            torch.tensor(labels).long().flatten(),
        )

    return Workload("cifar", batch_normed, tensors(x, y), tensors(x_test, y_test), 0.01, 0.9, epochs)


def _places(name: str) -> list[Path]:
    folders = [os.environ.get("HYDRAGRAD_DATA"), Path(__file__).parents[2] / "shared" / "data"]
    return [Path(folder) / name for folder in folders if folder]
