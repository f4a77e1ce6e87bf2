"""Leave-one-out and losses along the run, against loops written out."""

from pathlib import Path

import torch

import hydragrad as hg
from hydragrad.report.retraining import leave_one_out, losses_at, mean_training_losses
from tests.tasks.small import make_task
from tests.tolerances import UPDATE, assert_close
from tests.trajectory.loops import losses, sgd


def trained_without(task: hg.Task, run: hg.Run, left_out: int | None) -> torch.nn.Module:
    """The loop again, over the recorded ids, with one example's loss at weight zero."""
    model = task.build()
    optimizer = sgd(model)
    for step in run.steps:
        ids = step.batches[0]
        batch = [tensor[ids] for tensor in task.train.tensors]
        optimizer.zero_grad()
        each = losses(model, batch)
        (each[ids != left_out].sum() / len(ids) if left_out is not None else each.mean()).backward()
        optimizer.step()
    return model


def test_leave_one_out_is_training_without_the_example(tmp_path: Path) -> None:
    task = make_task()
    run = hg.train(task, tmp_path / "run")
    ids = torch.tensor([4, 0, 21])
    whole = trained_without(task, run, None)
    with torch.no_grad():
        before = losses(whole, task.test.tensors).double()
    rows = []
    for i in ids.tolist():
        model = trained_without(task, run, i)
        with torch.no_grad():
            rows.append(losses(model, task.test.tensors).double() - before)
    measured = leave_one_out(run, ids, task.test)
    assert float(measured.abs().min()) > 0
    # Differences of losses of about 1: what one step's rounding leaves, against that 1.
    assert_close(measured.float() + 1, torch.stack(rows).float() + 1, UPDATE)


def test_training_losses_are_averaged_over_the_stored_states_but_the_first(tmp_path: Path) -> None:
    task = make_task()
    run = hg.train(task, tmp_path / "run", checkpoint_every=4)
    assert run.trajectory.checkpoints == (0, 4, 8, 10)
    total = torch.zeros(len(task.train))
    model = task.build()
    for step in (4, 8, 10):
        model.load_state_dict(run.trajectory.state(step).params)
        with torch.no_grad():
            total += losses(model, task.train.tensors)
    assert_close(mean_training_losses(run), total / 3, UPDATE)
    with torch.no_grad():
        assert_close(losses_at(run, run.trajectory.state(10), task.train), losses(model, task.train.tensors), UPDATE)
