"""Forward passes in training mode after the last step: the trained model is not the one that the steps lead to."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hydragrad as hg
from tests.tolerances import FINITE_DIFFERENCE, assert_close
from tests.trajectory.loops import CLASSES, FEATURES, losses, make_data

N, WORDS = 10, "buffers changed after the last optimizer step.*incomplete last group.*take the optimizer step.*step=3"
DATA = make_data(N, torch.float64)
QUERIES = [make_data(14, torch.float64)[i] for i in range(11, 14)]


def build() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        middle = nn.BatchNorm1d(5, momentum=0.3)
        return nn.Sequential(nn.Linear(FEATURES, 5), middle, nn.Tanh(), nn.Linear(5, CLASSES)).double()


Loop = Callable[[Any, nn.Module, torch.optim.Optimizer, Callable[[nn.Module, Any, int], Tensor]], None]
"""(batches, model, optimizer, loss of the batch at a place): the training, of three steps on batches of two."""


def ungrouped(batches: Any, model: nn.Module, optimizer: Any, loss: Any) -> None:
    """A step for every two batches of seven; the last is left over."""
    for place, batch in enumerate(batches(14), 1):
        loss(model, batch, place - 1).backward()
        if place % 2 == 0:
            optimizer.step()
            optimizer.zero_grad()


def broken(batches: Any, model: nn.Module, optimizer: Any, loss: Any) -> None:
    """Left after a forward pass."""
    for place, batch in enumerate(batches(14)):
        value = loss(model, batch, place)
        if place == 3:
            break
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def thrown_away(batches: Any, model: nn.Module, optimizer: Any, loss: Any) -> None:
    """After the steps, gradients that are zeroed again."""
    for place, batch in enumerate(batches(10)):
        optimizer.zero_grad()
        loss(model, batch, place).backward()
        if place < 3:
            optimizer.step()


def recalibrated(batches: Any, model: nn.Module, optimizer: Any, loss: Any) -> None:
    """Running statistics taken anew over recorded batches."""
    broken_off(batches, model, optimizer, loss)
    for batch in batches(14):
        with torch.no_grad():
            model(batch[0])


def beside(batches: Any, model: nn.Module, optimizer: Any, loss: Any) -> None:
    """The same beside recorded batches."""
    broken_off(batches, model, optimizer, loss)
    with torch.no_grad():
        model(DATA.tensors[0])


def broken_off(batches: Any, model: nn.Module, optimizer: Any, loss: Any) -> None:
    """Three steps and nothing after them, but validation."""
    for place, batch in enumerate(batches(14)):
        if place == 3:
            break
        optimizer.zero_grad()
        loss(model, batch, place).backward()
        optimizer.step()
    model.eval()(DATA.tensors[0])
    model.train()


def ids_of(count: int) -> list[list[int]]:
    return [[i % N, (i + 1) % N] for i in range(0, count, 2)]


def record(loop: Loop, folder: Path, **more: Any) -> tuple[hg.Run, nn.Module]:
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
    with hg.record(folder, model, optimizer, **more) as recording:

        def batches(count: int) -> Any:
            return recording.batches(DataLoader(DATA, batch_sampler=ids_of(count)))  # type: ignore[arg-type]

        loop(batches, model, optimizer, lambda model, batch, place: losses(model, batch).mean())
    return hg.load(folder, model=build(), loss=losses, data=DATA), model


def queried(model: nn.Module) -> Tensor:
    inputs, labels = (torch.stack([torch.as_tensor(q[k]) for q in QUERIES]) for k in (0, 1))
    return losses(model.eval(), (inputs, labels)).detach()


def by_hand(loop: Loop, weights: Tensor, steps: int) -> Tensor:
    """The losses of the queries by the model as the last step left it, of a plain loop with weighted losses."""
    model, ends = build(), list[Tensor]()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)

    def measure(*_: Any) -> None:
        ends.append(queried(model))
        model.train()

    optimizer.register_step_post_hook(measure)

    def loss(model: nn.Module, batch: Any, place: int) -> Tensor:
        ids = torch.tensor(ids_of(14)[place])
        return (losses(model, batch) * weights[ids]).mean()

    loop(lambda count: [DATA[ids] for ids in ids_of(count)], model, optimizer, loss)
    assert len(ends) == steps
    return ends[-1]


@pytest.mark.parametrize("every", [1, 100])
@pytest.mark.parametrize("loop", [ungrouped, broken, thrown_away, recalibrated, beside])
def test_questions_about_the_end_are_refused(loop: Loop, every: int, tmp_path: Path) -> None:
    run, trained = record(loop, tmp_path / "run", checkpoint_every=every)
    assert run.num_steps == 3
    assert run.trajectory.moved
    before = next(run.states(3, 4)).buffers["1.running_mean"]
    assert not torch.allclose(before, trained.get_buffer("1.running_mean"))
    found = hg.verify(run)
    assert not found.ok
    assert not found.exact
    assert "buffers changed after the last optimizer step" in str(found)
    questions: list[Callable[[], Any]] = [
        run.replay,
        lambda: run.replay(weights=torch.ones(N)),
        lambda: hg.attribute(run, QUERIES, progress=False),
        lambda: hg.hypergradients(run, examples=[0], progress=False),
        lambda: hg.plan(run, QUERIES),
        lambda: hg.baselines.influence(run, QUERIES),
    ]
    for question in questions:
        with pytest.raises(hg.UnsupportedError, match=WORDS):
            question()


@pytest.mark.parametrize("loop", [ungrouped, broken, thrown_away, recalibrated])
def test_the_model_as_the_last_step_left_it(loop: Loop, tmp_path: Path) -> None:
    """Its statistics are those before the passes that no step followed: central differences of a plain loop."""
    run, _ = record(loop, tmp_path / "run")
    scores = hg.attribute(run, QUERIES, step=3, progress=False).values
    direction, step = torch.randn(N, dtype=torch.float64), 1e-5
    ends = [by_hand(loop, 1 + sign * step * direction, 3) for sign in (1, -1)]
    assert_close((ends[1] - ends[0]) / (2 * step), direction @ scores, FINITE_DIFFERENCE)


@pytest.mark.parametrize("every", [1, 100])
def test_batches_that_were_not_run_and_validation_change_nothing(every: int, tmp_path: Path) -> None:
    run, trained = record(broken_off, tmp_path / "run", checkpoint_every=every)
    assert run.trajectory.trailing == [[6, 7]]
    assert not run.trajectory.moved
    assert hg.verify(run).exact
    assert torch.equal(run.replay().buffers["1.running_mean"], trained.get_buffer("1.running_mean"))
