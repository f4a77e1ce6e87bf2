"""Training a task is an ordinary seeded loop, recorded."""

import os
from pathlib import Path

import pytest
import torch
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader
from tqdm import tqdm

import hydragrad as hg
from hydragrad.errors import StoreError
from tests.children import ended, fork
from tests.tasks.small import make_task
from tests.trajectory.loops import assert_same_params, losses, sgd


def final(run: hg.Run) -> dict[str, torch.Tensor]:
    return run.trajectory.state(run.num_steps).params


def by_hand(task: hg.Task, *, total: bool = False, gamma: float = 1.0) -> dict[str, torch.Tensor]:
    """The loop that a task stands for, written out."""
    torch.manual_seed(task.seed)
    model = task.model()
    optimizer = sgd(model)
    scheduler = StepLR(optimizer, 1, gamma)
    loader = DataLoader(task.train, 5, shuffle=True, generator=torch.Generator().manual_seed(task.seed))
    for _ in range(2):
        for batch in loader:
            optimizer.zero_grad()
            each = losses(model, batch)
            (each.sum() if total else each.mean()).backward()
            optimizer.step()
        scheduler.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_a_task_trains_as_the_loop_written_out(tmp_path: Path) -> None:
    task = make_task(seed=3)
    assert_same_params(final(hg.train(task, tmp_path / "run")), by_hand(task))


def test_the_scheduler_is_stepped_once_an_epoch(tmp_path: Path) -> None:
    task = make_task(scheduler=lambda optimizer: StepLR(optimizer, 1, 0.25))
    run = hg.train(task, tmp_path / "run")
    assert [step.groups[0]["lr"] for step in run.steps] == [0.1] * 5 + [0.025] * 5
    assert_same_params(final(run), by_hand(task, gamma=0.25))


def test_sums_and_coefficients_are_what_is_differentiated(tmp_path: Path) -> None:
    task = make_task(reduction="sum")
    assert_same_params(final(hg.train(task, tmp_path / "sum")), by_hand(task, total=True))
    by_rule = make_task(reduction=lambda batch, shape: torch.ones(shape))
    run = hg.train(by_rule, tmp_path / "rule")
    for name, value in by_hand(task, total=True).items():
        torch.testing.assert_close(final(run)[name], value)
    assert hg.verify(run), hg.verify(run)


def test_the_same_task_gives_the_same_run_and_another_seed_another(tmp_path: Path) -> None:
    torch.manual_seed(1)
    first = final(hg.train(make_task(), tmp_path / "first"))
    torch.manual_seed(2)
    assert_same_params(final(hg.train(make_task(), tmp_path / "second")), first)
    other = final(hg.train(make_task(seed=1), tmp_path / "other"))
    assert not torch.equal(other["0.weight"], first["0.weight"])


def test_a_task_builds_the_model_that_its_run_began_with(tmp_path: Path) -> None:
    run = hg.train(make_task(), tmp_path / "run")
    for seed in (1, 2):
        torch.manual_seed(seed)
        built = {name: parameter.detach() for name, parameter in make_task().build().named_parameters()}
        assert_same_params(built, run.trajectory.state(0).params)


def test_training_leaves_the_random_state(tmp_path: Path) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    hg.train(make_task(), tmp_path / "run").replay()
    make_task().build()
    assert torch.equal(torch.rand(3), expected)


def test_a_recorded_run_is_bound_to_its_task_and_to_no_other(tmp_path: Path) -> None:
    task = make_task()
    hg.train(task, tmp_path / "run")
    assert hg.verify(task.load(tmp_path / "run")).exact
    squared = make_task(loss=lambda model, batch: losses(model, batch) ** 2)
    with pytest.raises(hg.MismatchError, match="gradient"):
        squared.load(tmp_path / "run")


def test_a_run_is_not_overwritten_unasked(tmp_path: Path) -> None:
    hg.train(make_task(), tmp_path / "run")
    with pytest.raises(hg.StoreError, match="overwrite"):
        hg.train(make_task(), tmp_path / "run")
    assert hg.train(make_task(epochs=1), tmp_path / "run", overwrite=True).num_steps == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epochs": 0}, "epochs of task 'small'.*positive int.*Got: 0"),
        ({"batch_size": 2.5}, "batch_size of task 'small'.*Got: 2.5"),
    ],
)
def test_tasks_that_cannot_be_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(hg.MismatchError, match=words):
        make_task(**changes)


def test_a_loss_averaged_already_is_refused_at_once(tmp_path: Path) -> None:
    task = make_task(loss=lambda model, batch: losses(model, batch).mean())
    with pytest.raises(hg.MismatchError, match=r"not per example.*\[5\]"):
        hg.train(task, tmp_path / "run")
    with pytest.raises(hg.MismatchError, match="no task to train"):
        hg.train("digits", tmp_path / "name")  # type: ignore[arg-type]


@pytest.mark.parametrize("stopped_after", [1, 4, 5, 6, 8])
def test_a_killed_training_goes_on_and_ends_as_it_would_have(
    stopped_after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(seed=3, scheduler=lambda optimizer: StepLR(optimizer, 1, 0.5))
    whole = hg.train(task, tmp_path / "whole")

    def work() -> None:
        taken = iter(range(1, 99))
        monkeypatch.setattr(tqdm, "update", lambda *_: os._exit(9) if next(taken) > stopped_after else None)
        hg.train(task, tmp_path / "run", resume=True, checkpoint_every=2)

    assert ended(fork(work)) == 9
    run = hg.train(task, tmp_path / "run", resume=True, checkpoint_every=2)
    begun = (stopped_after - 1) // 2 * 2  # a segment that was being written when the process ended is lost
    assert ([at for at, _ in run.trajectory.resumptions] or [0])[0] in (begun, max(begun - 2, 0))
    assert_same_params(final(run), final(whole))
    assert [step.groups[0]["lr"] for step in run.steps] == [step.groups[0]["lr"] for step in whole.steps]
    assert hg.verify(run).exact
    with pytest.raises(StoreError, match="is finished"):
        hg.train(task, tmp_path / "run", resume=True, checkpoint_every=2)
