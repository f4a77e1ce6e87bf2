"""Fashion-MNIST's first 2000 training and 500 test images, 28 x 28 pixels of clothes, packaged; LeNet-5."""

from importlib import resources

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from hydragrad.tasks.digits import CLASSES, cross_entropy, rightness
from hydragrad.tasks.task import Task

FILE = "fashion_mnist_2000.npz"
"""Xiao, Rasul, Vollgraf 2017, arXiv 1708.07747; MIT licence, beside the file."""

NAMES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")


def fashion(*, lr: float = 0.02, momentum: float = 0.9, epochs: int = 5, batch_size: int = 64, seed: int = 0) -> Task:
    """The Fashion-MNIST task: pixels / 255, LeNet-5 (ReLU, max pooling), cross entropy, SGD.

    Example: ``run = hydragrad.train(fashion(epochs=2), "runs/fashion")``.
    """
    train, test = images()
    return Task(
        name="fashion",
        model=lenet,
        loss=cross_entropy,
        train=train,
        test=test,
        optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum),
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        accuracy=rightness,
        names=NAMES,
    )


def images() -> tuple[TensorDataset, TensorDataset]:
    """The packaged images [n, 1, 28, 28], float32 in 0..1, with their labels: 2000 for training, 500 for testing."""
    with (
        resources.files("hydragrad.tasks").joinpath("data", FILE).open("rb") as file,
        np.load(file, allow_pickle=False) as kept,
    ):
        return _tensors(kept["x_train"], kept["y_train"]), _tensors(kept["x_test"], kept["y_test"])


def lenet() -> nn.Module:
    """LeNet-5 as commonly trained today: ReLU, max pooling."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(400, 120), nn.ReLU(), nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, CLASSES),
    )  # fmt: skip


def _tensors(pixels: np.ndarray, labels: np.ndarray) -> TensorDataset:
    scaled: Tensor = torch.tensor(pixels[:, None], dtype=torch.float32) / 255
    return TensorDataset(scaled, torch.tensor(labels, dtype=torch.int64))
