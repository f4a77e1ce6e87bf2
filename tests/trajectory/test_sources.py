"""Which number a loader has, and which pass over it this is: also where loops make their loaders anew."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, SubsetRandomSampler

from hydragrad.attributing import attribute
from hydragrad.run import Run
from hydragrad.trajectory.augmentation import Augmented, EpochIndex
from hydragrad.trajectory.recording import Recording, record
from hydragrad.trajectory.resuming import Resumption
from hydragrad.trajectory.store import Trajectory
from hydragrad.verification import verify
from tests.tolerances import FINITE_DIFFERENCE, assert_close
from tests.trajectory.loops import N, bind, losses, make_data, make_model, sgd
from tests.trajectory.test_augmentation import Noisy
from tests.trajectory.test_gone_on import StopHere, content, stopping

EPOCHS = 3
Batches = Callable[[Recording], Any]


def anew(data: Any, epoch: int, size: int = 5, **options: Any) -> DataLoader:
    """What a loop makes for one epoch, its order drawn from a generator of its own."""
    return DataLoader(data, size, shuffle=True, generator=torch.Generator().manual_seed(epoch), **options)


def recorded(path: Path, batches: Batches, data: Any = None) -> Run:
    model = make_model()
    optimizer = sgd(model)
    with record(path, model, optimizer, checkpoint_every=4) as recording:
        for batch in batches(recording):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
    return bind(path, data=make_data() if data is None else data)


def epochs_of(run: Run) -> list[int]:
    return [step.epoch for step in run.steps]


@pytest.mark.filterwarnings("ignore:This DataLoader")
@pytest.mark.parametrize("workers", [0, 2])
def test_loaders_made_anew_for_every_epoch_go_on_with_its_number(workers: int, tmp_path: Path) -> None:
    data, seen = Augmented(Noisy()), list[Tensor]()

    def batches(recording: Recording) -> Any:
        for epoch in range(EPOCHS):
            for batch in recording.batches(anew(data, epoch, num_workers=workers)):
                seen.append(batch[0].clone())
                yield batch

    run = recorded(tmp_path / "run", batches, data)
    assert epochs_of(run) == [0] * 5 + [1] * 5 + [2] * 5
    assert verify(run).exact
    for step, points in zip(run.steps, seen, strict=True):
        expected = [data[EpochIndex(i, step.epoch)][0] for i in step.batches[0].tolist()]
        assert torch.equal(points, torch.stack(expected))
    assert not torch.equal(data[EpochIndex(3, 0)][0], data[EpochIndex(3, 1)][0])


def test_batches_of_growing_size(tmp_path: Path) -> None:
    data = make_data()
    run = recorded(
        tmp_path / "run", lambda r: (b for e in range(EPOCHS) for b in r.batches(anew(data, e, size=11 * (e + 1))))
    )
    assert epochs_of(run) == [0, 0, 1, 2]


def by_hand(weights: Tensor) -> Tensor:
    """The same training written out, its weights [E, N] by epoch; the loss of each query."""
    data, model = make_data(dtype=torch.float64), make_model(torch.float64)
    optimizer = sgd(model)
    for epoch in range(EPOCHS):
        order = iter(anew(range(N), epoch))
        for ids in order:
            optimizer.zero_grad()
            (weights[epoch][ids] * losses(model, [x[ids] for x in data.tensors])).mean().backward()
            optimizer.step()
    with torch.no_grad():
        return losses(model, [x[:3] for x in data.tensors])


def test_the_scores_of_each_epoch(tmp_path: Path) -> None:
    data, model, h = make_data(dtype=torch.float64), make_model(torch.float64), 1e-5
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        for epoch in range(EPOCHS):
            for batch in recording.batches(anew(data, epoch)):
                optimizer.zero_grad()
                losses(model, batch).mean().backward()
                optimizer.step()
    run = bind(tmp_path / "run", data=data, model=make_model(torch.float64))
    scores = attribute(run, [data[i] for i in range(3)], by_epoch=True, check=False, progress=False)
    assert scores.values.shape == (EPOCHS, N, 3)
    for epoch, example in ((0, 4), (1, 0), (2, 21)):
        change = torch.zeros(EPOCHS, N, dtype=torch.float64)
        change[epoch, example] = h
        expected = -(by_hand(1 + change) - by_hand(1 - change)) / (2 * h)
        assert_close(scores.values[epoch, example], expected, FINITE_DIFFERENCE)


def test_passes_that_overlap_are_counted_each_by_itself(tmp_path: Path) -> None:
    """Two loaders side by side, of different lengths: the same, or made anew."""
    data = make_data()
    kept = DataLoader(data, 5), DataLoader(data, 4, sampler=SubsetRandomSampler(range(20)))

    def fresh() -> tuple[DataLoader, DataLoader]:
        return DataLoader(data, 5), DataLoader(data, 4, sampler=SubsetRandomSampler(range(20)))

    for name, made in (("kept", lambda: kept), ("fresh", fresh)):
        steps = together(tmp_path / name, made).steps
        assert [step.loaders for step in steps] == [(0, 1)] * len(steps)
        assert [step.epochs for step in steps] == [(e, e) for e in range(EPOCHS) for _ in range(5)]


def together(path: Path, made: Callable[[], tuple[DataLoader, DataLoader]]) -> Run:
    """One step for a batch of each."""
    model = make_model()
    optimizer = sgd(model)
    with record(path, model, optimizer) as recording:
        for _ in range(EPOCHS):
            for one, other in zip(*map(recording.batches, made()), strict=True):
                optimizer.zero_grad()
                (losses(model, one).mean() + losses(model, other).mean()).backward()
                optimizer.step()
    return bind(path)


def test_two_loaders_in_turn_and_one_within_another(tmp_path: Path) -> None:
    """Each pass in turn is an epoch; a pass that begins within another's is counted by itself."""
    data = make_data()
    one, other = DataLoader(data, 11), DataLoader(data, 22)
    run = recorded(
        tmp_path / "turns", lambda r: (b for _ in range(2) for loader in (one, other) for b in r.batches(loader))
    )
    assert epochs_of(run) == [0, 0, 1, 2, 2, 3]

    def nested(recording: Recording) -> Any:
        for _ in range(2):
            for batch in recording.batches(one):
                yield batch
                yield from recording.batches(DataLoader(data, 22))

    run = recorded(tmp_path / "nested", nested)
    assert [(step.loaders, step.epoch) for step in run.steps] == [
        ((0,), 0), ((1,), 0), ((0,), 0), ((1,), 1), ((0,), 1), ((1,), 2), ((0,), 1), ((1,), 3),
    ]  # fmt: skip
    assert verify(run).exact


def going_on(folder: Path, size: int, late: bool, on_step: Callable[[int], object] = lambda step: None) -> Resumption:
    """``late``: the last step of each epoch is taken after its pass has ended."""
    torch.manual_seed(1)
    model, data = make_model(), Augmented(Noisy())
    optimizer = sgd(model)
    with record(folder, model, optimizer, checkpoint_every=5, resume=True) as recording:
        where = recording.restore()
        step = where.step
        for epoch in range(where.epoch, EPOCHS):
            loader = anew(data, epoch, size)
            left = len(loader) - (where.batch if epoch == where.epoch else 0)
            for batch in recording.batches(loader):
                left -= 1
                optimizer.zero_grad()
                losses(model, batch).mean().backward()
                if left or not late:
                    optimizer.step()
                    step += 1
                    on_step(step)
            if late:
                optimizer.step()
                step += 1
                on_step(step)
    return where


@pytest.mark.parametrize(("size", "late"), [(4, False), (5, False), (5, True)])
def test_loops_that_make_loaders_anew_go_on_after_a_kill(size: int, late: bool, tmp_path: Path) -> None:
    """From states within a pass (six steps each), at its end (five steps each), and between two."""
    going_on(tmp_path / "whole", size, late)
    expected = content(tmp_path / "whole")
    for at in (4, 6, 7, 11, 12, 14):
        with pytest.raises(StopHere):
            going_on(tmp_path / f"{at}", size, late, stopping(at))
        where = going_on(tmp_path / f"{at}", size, late)
        assert where.step == (at - 1) // 5 * 5
        assert content(tmp_path / f"{at}") == expected
        assert len(Trajectory(tmp_path / f"{at}").resumptions) == 1
        assert verify(bind(tmp_path / f"{at}", data=Augmented(Noisy()))).exact
