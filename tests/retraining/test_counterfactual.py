"""Changed runs, against loops written out; losses along the run."""

from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

import hydragrad as hg
from hydragrad.retraining.counterfactual import Change, first_replayed, retrained
from hydragrad.retraining.measuring import losses_at
from hydragrad.signals.along import mean_losses
from tests.retraining.by_hand import test_losses, trained_again
from tests.tasks.small import make_task
from tests.tolerances import UPDATE, assert_close
from tests.trajectory.loops import assert_same_params, bind, losses, make_data, make_model, params_of, sgd


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return hg.train(make_task(), tmp_path_factory.mktemp("retraining") / "run", checkpoint_every=4)


def relabelled(place: int) -> tuple[Change, torch.Tensor]:
    """Example ``place`` with the next label, and all labels then."""
    points, labels = make_data().tensors
    labels = labels.clone()
    labels[place] = (labels[place] + 1) % 3
    return Change((place,), samples=((points[place], labels[place]),)), labels


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_a_removal_is_training_without_the_examples(run: hg.Run, weight: float, early: bool) -> None:
    expected = params_of(trained_again(make_task(), run, [4, 17], weight))
    state = retrained(run, Change((4, 17), weight), run.num_steps, early=early)
    for name, value in state.params.items():
        assert_close(value, expected[name], UPDATE)


@pytest.mark.parametrize("early", [True, False])
def test_the_others_may_weigh_more(run: hg.Run, early: bool) -> None:
    last = tuple(run.steps[4].batches[0].tolist())  # these are seen after the first checkpoint alone
    expected = params_of(trained_again(make_task(), run, last, 0.0, others=2.0))
    change = Change(last, others=2.0)
    state = retrained(run, change, run.num_steps, early=early)
    for name, value in state.params.items():
        assert_close(value, expected[name], UPDATE)
    assert first_replayed(run, change, 10) == 0, "everything is touched"
    assert first_replayed(run, Change(last), 10) == 4
    assert change.describe(run.problem) != Change(last).describe(run.problem)


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("place", [0, 9, 21])
def test_another_label_is_training_on_that_label(run: hg.Run, place: int, early: bool) -> None:
    change, labels = relabelled(place)
    assert_same_params(
        retrained(run, change, run.num_steps, early=early).params,
        params_of(trained_again(make_task(), run, labels=labels)),
    )


def test_as_trained_is_the_recorded_run(run: hg.Run) -> None:
    assert_same_params(retrained(run, Change(), 10).params, run.trajectory.state(10).params)
    assert_same_params(retrained(run, Change(), 8).params, run.trajectory.state(8).params)


def test_a_replay_begins_at_the_checkpoint_before_the_change(run: hg.Run) -> None:
    for place in range(22):
        first = min(step.index for step in run.steps if place in step.batches[0])
        assert first_replayed(run, Change((place,)), 10) == first // 4 * 4
    assert first_replayed(run, Change(), 10) == 0


def test_other_data_beside_the_changed_sample_is_refused(run: hg.Run) -> None:
    points, labels = make_data().tensors
    points = points.clone()
    points[int(run.steps[7].batches[0][1])] += 1  # unseen by loading, which looks at the first step
    if any(int(run.steps[7].batches[0][1]) in s.batches[0] for s in run.steps[:1]):
        pytest.skip("seen at once")
    altered = bind_task(run, torch.utils.data.TensorDataset(points, labels))
    change, _ = relabelled(int(run.steps[0].batches[0][0]))
    with pytest.raises(hg.MismatchError, match="the content of the data changed"):
        retrained(altered, change, run.num_steps)


def bind_task(run: hg.Run, data: object) -> hg.Run:
    task = make_task()
    return hg.load(run.trajectory.folder, model=task.build(), loss=task.loss, data=data)


@pytest.mark.parametrize(
    ("sample", "words"),
    [
        ((torch.zeros(6), torch.tensor(1.5)), r"another form.*int64.*float32"),
        ((torch.zeros(5), torch.tensor(1)), r"another form.*\[6\].*\[5\]"),
        ((torch.zeros(6),), "another form"),
        ((torch.zeros(6), object()), "cannot be collated"),
    ],
)
def test_samples_of_another_form_are_refused(run: hg.Run, sample: object, words: str) -> None:
    with pytest.raises(hg.MismatchError, match=words):
        retrained(run, Change((3,), samples=(sample,)), run.num_steps)


def test_samples_of_a_set_asked_for_whole_batches_are_refused(tmp_path: Path) -> None:
    class Whole(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 22

        def __getitem__(self, ids: list[int]) -> list[torch.Tensor]:
            return [tensor[ids] for tensor in make_data().tensors]

    model, sampler = make_model(), torch.utils.data.BatchSampler(range(22), 5, drop_last=False)  # type: ignore[arg-type]
    optimizer = sgd(model)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for batch in recording.batches(DataLoader(Whole(), batch_size=None, sampler=sampler)):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
    run = bind(tmp_path / "run", data=Whole())
    with pytest.raises(hg.UnsupportedError, match="single samples cannot be replaced"):
        retrained(run, relabelled(2)[0], run.num_steps)
    retrained(run, Change((2,)), run.num_steps)


def test_training_losses_are_averaged_over_the_stored_states_but_the_first(run: hg.Run) -> None:
    task = make_task()
    assert run.trajectory.checkpoints == (0, 4, 8, 10)
    total = torch.zeros(len(task.train))
    model = task.build()
    for step in (4, 8, 10):
        model.load_state_dict(run.trajectory.state(step).params)
        with torch.no_grad():
            total += losses(model, task.train.tensors)
    assert_close(mean_losses(run), total / 3, UPDATE)
    assert_close(
        losses_at(run, run.trajectory.state(10), task.test).double(), test_losses(task, model), {torch.float64: 1e-6}
    )
