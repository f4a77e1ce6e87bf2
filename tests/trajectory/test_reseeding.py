"""A loss that seeds a generator by itself ends where it began: no draw is seen, and none needs to be."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from hydragrad.attributing import attribute
from hydragrad.run import load
from hydragrad.trajectory.randomness import RandomState, RandomWatch
from hydragrad.trajectory.recording import record
from hydragrad.verification import verify
from tests.tolerances import FINITE_DIFFERENCE, assert_close
from tests.trajectory.loops import N, losses, make_data, make_loader, make_model, sgd

STEP = 1e-5


def noisy(batch: Any) -> Any:
    points, labels = batch
    return points + 0.3 * torch.randn(points.shape, dtype=points.dtype), labels


def seeding(model: nn.Module, batch: Any) -> Tensor:
    torch.manual_seed(0)
    return losses(model, noisy(batch))


def forking(model: nn.Module, batch: Any) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        batch = noisy(batch)
    return losses(model, batch)


@pytest.mark.parametrize("loss", [seeding, forking])
def test_what_a_loss_seeds_itself_comes_again_in_replay_and_sweeps(
    loss: Callable[[nn.Module, Any], Tensor], tmp_path: Path
) -> None:
    data, model = make_data(dtype=torch.float64), make_model(torch.float64)
    optimizer, loader = sgd(model), make_loader(data)
    with record(tmp_path / "run", model, optimizer, checkpoint_every=4) as recording:
        for _ in range(2):
            for batch in recording.batches(loader):
                optimizer.zero_grad()
                loss(model, batch).mean().backward()
                optimizer.step()
    run = load(tmp_path / "run", model=make_model(torch.float64), loss=loss, data=data)
    assert not all(step.random for step in run.steps)  # as the generators stand where they stood
    torch.manual_seed(99)
    before = RandomState.capture().tensors()["torch"]
    assert verify(run).exact
    queries = [data[i] for i in range(2)]
    scores = attribute(run, queries, measurement=losses, check=False).values
    assert torch.equal(RandomState.capture().tensors()["torch"], before)

    direction = torch.randn(N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ends = []
    for sign in (1, -1):
        state, trained = run.replay(weights=1 + sign * STEP * direction), make_model(torch.float64)
        trained.load_state_dict(state.params)
        ends.append(torch.cat([losses(trained, [part[None] for part in query]) for query in queries]).detach())
    assert_close(direction @ scores, (ends[1] - ends[0]) / (2 * STEP), FINITE_DIFFERENCE)


@pytest.mark.parametrize("seed", [torch.manual_seed, np.random.seed, random.seed])
def test_seeds_between_which_nothing_was_drawn_are_told_apart(seed: Callable[[int], Any]) -> None:
    watch = RandomWatch(torch.device("cpu"))
    seed(1)
    for number in (2, 3):
        watch.begin()
        seed(number)
        assert watch.end() is not None
