"""A training task: everything an ordinary training loop needs, in one place."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from hydragrad.errors import MismatchError, message
from hydragrad.problem import Coefficients, Loss
from hydragrad.run import Run, kept_random_state, load


@final
@dataclass(frozen=True)
class Task:
    """A training run before it happens; for those who have no loop of their own. ``train`` carries it out.

    ``model() -> nn.Module`` is called under ``seed``, which also shuffles the batches; ``loss(model, batch) -> [b]``;
    ``train`` and ``test``: data sets (``__len__``, ``__getitem__``); ``optimizer(model) -> Optimizer``;
    ``scheduler(optimizer) -> LRScheduler``, stepped once an epoch; ``reduction``: "mean", "sum" or (batch, shape) ->
    coefficients; ``accuracy(model, batch) -> [b]`` of 0 and 1, for classifiers. Where labels were spoilt on purpose:
    ``true_labels`` [N] and ``flipped_ids``, for evaluation only. For reports: ``show(sample) -> image or text`` where
    the input is not what a reader should see (token ids, flattened images), and ``names`` of the labels 0, 1, ...

    Example: ``run = hydragrad.train(task, "runs/mine")``, and in another process ``run = task.load("runs/mine")``.
    """

    name: str
    model: Callable[[], nn.Module]
    loss: Loss
    train: Any
    test: Any
    optimizer: Callable[[nn.Module], Optimizer]
    batch_size: int = 64
    epochs: int = 15
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    seed: int = 0
    reduction: str | Coefficients = "mean"
    collate_fn: Callable[[Any], Any] | None = None
    accuracy: Callable[[nn.Module, Any], Tensor] | None = None
    true_labels: Tensor | None = None
    flipped_ids: Tensor | None = None
    show: Callable[[Any], Tensor | str] | None = None
    names: Sequence[str] | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "epochs"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise MismatchError(message(f"{name} of task {self.name!r}", expected="a positive int", got=value))
        if isinstance(self.model, nn.Module):
            raise MismatchError(
                message(
                    f"model of task {self.name!r} is a module",
                    expected="a function without arguments that makes one, so that a run can begin anew",
                    got=type(self.model).__name__,
                    remedy="model=lambda: torch.nn.Linear(2, 2), say",
                )
            )

    def __repr__(self) -> str:
        return f"Task({self.name!r}, {len(self.train)} training and {len(self.test)} test examples)"

    def build(self) -> nn.Module:
        """The untrained model, the same at every call; torch's random state stays as it was."""
        with kept_random_state():
            torch.manual_seed(self.seed)
            return self.model()

    def optimize(self, model: nn.Module) -> Optimizer:
        """The optimizer of ``model``; raises MismatchError where ``optimizer`` makes none of it."""
        try:
            made: Any = self.optimizer(model)
        except TypeError as error:
            made = error
        if isinstance(made, Optimizer):
            return made
        raise MismatchError(
            message(
                f"optimizer of task {self.name!r} makes none",
                expected="a function of the model that returns a torch optimizer",
                got=f"{type(made).__name__}: {made}" if isinstance(made, TypeError) else type(made).__name__,
                remedy="optimizer=lambda model: torch.optim.SGD(model.parameters(), lr=0.1), say",
            )
        ) from (made if isinstance(made, TypeError) else None)

    def load(self, path: str | Path) -> Run:
        """A recorded run of this task, bound to its model, loss and data; raises what ``hydragrad.load`` raises."""
        return load(
            path,
            model=self.build(),
            loss=self.loss,
            data=self.train,
            reduction=self.reduction,
            collate_fn=self.collate_fn,
        )
