"""A classifier trained in a plain loop under `hg.record`, of any length: for what is counted or timed, not derived."""

from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

import hydragrad as hg


def losses(model: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")


def train(
    folder: Path, model: nn.Module, optimizer: Optimizer, data: TensorDataset, batch: int, steps: int, every: int
) -> None:
    """``steps`` steps, in whole passes over the data in its order; a state stored ``every`` so many."""
    with hg.record(folder, model, optimizer, checkpoint_every=every) as recording:
        for _ in range(steps * batch // len(data)):
            for one in recording.batches(DataLoader(data, batch)):
                optimizer.zero_grad()
                losses(model, one).mean().backward()
                optimizer.step()
