"""scikit-learn's handwritten digits: 1797 images of 8 x 8 pixels, a small network, a second of training."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.tasks.task import Task

CLASSES = 10
TRAIN, TEST = 1437, 360
SPLIT_SEED = 0
"""Which images are for training and which for testing never depends on the other seeds."""


def digits(
    *,
    flipped: float = 0.0,
    optimizer: str = "sgd",
    lr: float | None = None,
    momentum: float | None = None,
    weight_decay: float | None = None,
    epochs: int = 15,
    batch_size: int = 64,
    seed: int = 0,
    flip_seed: int = 0,
    train_size: int = TRAIN,
    test_size: int = TEST,
) -> Task:
    """The digits task: pixels / 16, a 64-128-64-10 network with tanh, cross entropy.

    ``flipped``: fraction of the training labels changed to another class under ``flip_seed`` (the task then keeps
    ``true_labels`` and ``flipped_ids``); ``optimizer``: "sgd" (lr 0.1, momentum 0.9, no weight decay unless given) or
    "adamw" (lr 0.001, weight decay 0.01 unless given); ``train_size``, ``test_size``: the first so many images of the
    fixed split. Raises UnsupportedError without scikit-learn, MismatchError for arguments that make no sense.

    Example: ``digits(flipped=0.1, lr=0.02, momentum=0.0)``.
    """
    make_optimizer = _optimizer(optimizer, lr, momentum, weight_decay)
    _check("flipped", flipped, 0, 1)
    _check("train_size", train_size, 1, TRAIN)
    _check("test_size", test_size, 1, TEST)
    images, labels = _load()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    of_train, of_test = order[:TRAIN][:train_size], order[TRAIN:][:test_size]
    true = labels[of_train]
    given, flipped_ids = flip_labels(true, flipped, CLASSES, flip_seed)
    return Task(
        name="digits-flipped" if len(flipped_ids) else "digits",
        model=network,
        loss=cross_entropy,
        train=TensorDataset(images[of_train], given),
        test=TensorDataset(images[of_test], labels[of_test]),
        optimizer=make_optimizer,
        batch_size=batch_size,
        epochs=epochs,
        seed=seed,
        accuracy=rightness,
        true_labels=true,
        flipped_ids=flipped_ids,
        show=ink,
    )


def flipped_digits() -> Task:
    """The digits task with a tenth of its training labels flipped: the demo's."""
    return digits(flipped=0.1)


def network() -> nn.Module:
    """64 pixels, two hidden layers of tanh, ten classes."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, CLASSES)
    )  # fmt: skip


def cross_entropy(model: nn.Module, batch: Any) -> Tensor:
    """Per-example cross entropy of (images, labels), [b]."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="none")


def rightness(model: nn.Module, batch: Any) -> Tensor:
    """1 where the most likely class of (images, labels) is the label, else 0, [b]."""
    images, labels = batch
    return (model(images).argmax(1) == labels).to(images.dtype)


def ink(sample: tuple[Tensor, Tensor]) -> Tensor:
    """The image of a sample as it was written, [8, 8]: dark ink on white."""
    return 1 - sample[0].reshape(8, 8)


def flip_labels(labels: Tensor, fraction: float, classes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Labels [N] with a fraction changed to another class, all others equally likely; and the changed ids, sorted."""
    generator = torch.Generator().manual_seed(seed)
    count = round(fraction * len(labels))
    ids = torch.randperm(len(labels), generator=generator)[:count].sort().values
    shifts = torch.randint(1, classes, (count,), generator=generator)
    given = labels.clone()
    given[ids] = (labels[ids] + shifts) % classes
    return given, ids


def _load() -> tuple[Tensor, Tensor]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise UnsupportedError(
            message("the digits are scikit-learn's, which is not installed", remedy="pip install 'hydragrad[data]'")
        ) from error
    data: Any = load_digits()
    return torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target, dtype=torch.int64)


def _optimizer(
    name: str, lr: float | None, momentum: float | None, weight_decay: float | None
) -> Callable[[nn.Module], Optimizer]:
    if name == "sgd":
        options: dict[str, Any] = {
            "lr": 0.1 if lr is None else lr,
            "momentum": 0.9 if momentum is None else momentum,
            "weight_decay": weight_decay or 0.0,
        }
        return lambda model: torch.optim.SGD(model.parameters(), **options)
    if name == "adamw":
        if momentum is not None:
            raise MismatchError(
                message("AdamW has no momentum to set", got=f"momentum={momentum}", remedy="leave it out")
            )
        options: dict[str, Any] = {
            "lr": 0.001 if lr is None else lr,
            "weight_decay": 0.01 if weight_decay is None else weight_decay,
        }
        return lambda model: torch.optim.AdamW(model.parameters(), **options)
    raise MismatchError(message("no such optimizer", expected="'sgd' or 'adamw'", got=repr(name)))


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise MismatchError(message(f"{name} is out of range", expected=f"{least} to {most}", got=value))
