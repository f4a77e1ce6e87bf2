"""The recorded steps revisited: the same moments in either direction, whatever is kept in memory or on disk."""

import itertools
import math
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from hydragrad.errors import MismatchError
from hydragrad.run import Run
from hydragrad.trajectory.agreement import state_difference
from hydragrad.trajectory.moments import Backwards, Moment, forwards
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.state import UNREAD, State
from hydragrad.trajectory.store import Trajectory
from tests.trajectory.loops import assert_same_params, bind, losses, make_data, make_model, record_run, sgd, train

STEPS = 25  # five passes over 22 examples in batches of 5, the last of each smaller
SPACINGS = [1, 4, 7, 100]
MOST = [2, 3, 5, 1000]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """The same training, stored with checkpoints at different spacings."""
    folder = tmp_path_factory.mktemp("moments")
    for spacing in SPACINGS:
        record_run(folder / str(spacing), epochs=5, checkpoint_every=spacing)
    return {spacing: bind(folder / str(spacing)) for spacing in SPACINGS}


def backwards(run: Run, stop: int, most: int) -> Backwards:
    return Backwards(run.replayer(), run.trajectory, stop, most)


def assert_moments(found: list[Moment], run: Run, indices: list[int]) -> None:
    """Record, state and batches as recorded, bit for bit, and the gradient of a plain forward and backward pass."""
    assert [m.record.index for m in found] == indices
    states = {state.step: state for state in run.states(0, run.num_steps)}
    data = make_data()
    for moment in found:
        index = moment.record.index
        assert moment.record is run.steps[index]
        assert_same_state(moment.state, states[index])
        ((ids, batch),) = moment.batches
        assert torch.equal(ids, run.steps[index].batches[0])
        assert all(torch.equal(x, y[ids]) for x, y in zip(batch, data.tensors, strict=True))
        for name, gradient in plain_gradient(run, states[index], ids).items():
            assert torch.equal(moment.gradient[name], gradient), (index, name)


def assert_same_state(a: State, b: State) -> None:
    assert a.step == b.step
    assert_same_params(a.params, b.params)
    assert_same_params(a.buffers, b.buffers)
    assert a.optimizer.keys() == b.optimizer.keys()
    for name, slots in a.optimizer.items():
        assert_same_params(slots, b.optimizer[name])


def plain_gradient(run: Run, state: State, ids: Tensor) -> dict[str, Tensor]:
    """Of the mean loss over these examples, by the loop that a user writes."""
    model = run.problem.model
    model.load_state_dict({**state.params, **state.buffers})
    model.zero_grad()
    losses(model, [x[ids] for x in make_data().tensors]).mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_backwards(runs: dict[int, Run], spacing: int, most: int) -> None:
    assert_moments(list(backwards(runs[spacing], STEPS, most)), runs[spacing], list(reversed(range(STEPS))))


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("spacing", SPACINGS)
def test_for_a_linear_update_they_come_without_slots(runs: dict[int, Run], spacing: int, most: int) -> None:
    run, starts, unread = runs[spacing], 0, 0
    swept = Backwards(run.replayer(), run.trajectory, STEPS, most, linear=True)
    for whole, light in zip(backwards(run, STEPS, most), swept, strict=True):
        assert_same_params(light.state.params, whole.state.params)
        assert_same_params(light.gradient, whole.gradient)
        assert light.state.optimizer.keys() == whole.state.optimizer.keys()
        slots = [slot for slots in light.state.optimizer.values() for slot in slots.values()]
        if slots and all(slot is UNREAD for slot in slots):
            unread += 1
        else:  # where a replay starts from
            assert_same_state(light.state, whole.state)
            starts += 1
    assert set(swept.drift.values()) == {0.0}
    assert starts
    assert unread or spacing == 1  # then every state is one
    with pytest.raises((RuntimeError, NotImplementedError)):
        _ = UNREAD + torch.ones(3)


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("stop", [1, 8, 13, 24])
def test_backwards_from_an_earlier_step(runs: dict[int, Run], stop: int, most: int) -> None:
    for run in runs.values():
        assert_moments(list(backwards(run, stop, most)), run, list(reversed(range(stop))))


@pytest.mark.parametrize("stop", [1, 8, 13, STEPS])
def test_forwards(runs: dict[int, Run], stop: int) -> None:
    for run in runs.values():
        assert_moments(list(forwards(run.replayer(), run.trajectory, stop)), run, list(range(stop)))


class Shifted(nn.Module):
    """A model with a buffer, whose state amid a step cannot be told apart from that before it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = make_model()
        self.register_buffer("shift", torch.linspace(-0.1, 0.1, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x) + self.shift


@pytest.fixture(scope="module")
def broken_off(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """18 steps, the last checkpoint at 14: training broke off amid a step."""
    path, model = tmp_path_factory.mktemp("moments") / "broken off", Shifted()
    loader = DataLoader(make_data(), 5, shuffle=True, generator=torch.Generator().manual_seed(2))

    def interrupted() -> None:
        optimizer, taken = sgd(model), 0
        with record(path, model, optimizer, checkpoint_every=7) as recording:
            while True:
                for batch in recording.batches(loader):
                    if taken == 18:
                        raise KeyboardInterrupt
                    optimizer.zero_grad()
                    losses(model, batch).mean().backward()
                    optimizer.step()
                    taken += 1

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    return bind(path, model=Shifted())


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("stop", [18, 16, 14, 3])
def test_a_run_without_its_last_checkpoint(broken_off: Run, stop: int, most: int) -> None:
    assert broken_off.trajectory.checkpoints == (0, 7, 14)
    assert not broken_off.trajectory.complete
    swept = backwards(broken_off, stop, most)
    assert_moments(list(swept), broken_off, list(reversed(range(stop))))
    assert swept.drift == {step: 0.0 for step in (7, 14) if step <= stop}
    assert_moments(list(forwards(broken_off.replayer(), broken_off.trajectory, stop)), broken_off, list(range(stop)))


@pytest.mark.parametrize("most", MOST)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("stop", [16, STEPS])
def test_an_honest_replay_does_not_drift(runs: dict[int, Run], spacing: int, most: int, stop: int) -> None:
    swept = backwards(runs[spacing], stop, most)
    list(swept)
    assert swept.drift == {step: 0.0 for step in runs[spacing].trajectory.checkpoints if 0 < step <= stop}


@pytest.mark.parametrize("most", [2, 1000])
@pytest.mark.parametrize("altered", [7, 14, STEPS])
def test_drift_from_an_altered_checkpoint(runs: dict[int, Run], altered: int, most: int, monkeypatch) -> None:
    run, original = runs[7], Trajectory.state

    def state(self: Trajectory, step: int) -> State:
        stored = original(self, step)
        if step != altered:
            return stored
        weight = stored.params["0.weight"].clone()
        weight.view(-1)[int(weight.abs().argmax())] *= 1 + 1e-3
        return replace(stored, params={**stored.params, "0.weight": weight})

    monkeypatch.setattr(Trajectory, "state", state)
    # from there the altered state is replayed, whose gradients are not the recorded ones: not this test's matter
    swept = Backwards(run.replayer(check=False), run.trajectory, STEPS, most)
    list(swept)
    assert swept.drift[altered] == pytest.approx(1e-3, rel=2e-3)
    assert all(drift == 0.0 for step, drift in swept.drift.items() if step < altered)


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.parametrize("most", [2, 1000])
def test_a_sweep_that_meets_another_gradient_names_the_step(runs: dict[int, Run], most: int, linear: bool) -> None:
    run, wrong = runs[7], 16
    ids = run.steps[wrong].batches[0]

    def other(model: nn.Module, batch: Any) -> Tensor:
        values = losses(model, batch)
        same = len(batch[0]) == len(ids) and all(
            torch.equal(a, b[ids]) for a, b in zip(batch, make_data().tensors, strict=True)
        )
        return values * 1.5 if same else values

    changed = Run(replace(run.problem, loss=other), run.trajectory)
    swept = Backwards(changed.replayer(), changed.trajectory, STEPS, most, linear=linear)
    with pytest.raises(MismatchError, match=f"step {wrong} is 1.5 times larger"):
        list(swept)


@pytest.mark.parametrize("epochs", [1, 3])
def test_examples_that_changed_places_within_a_batch_are_refused(epochs: int, tmp_path: Path) -> None:
    """Some such swaps leave every gradient and state as it was, bit for bit: only the batches tell."""
    data, model = make_data(20), make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with record(tmp_path / "run", model, optimizer) as recording:
        train(model, optimizer, DataLoader(data, 4), recording.batches, epochs=epochs)
    taken, told = list[tuple[int, int]](), set[str]()
    for first, second in itertools.combinations(range(4, 20), 2):
        if first // 4 != second // 4:
            continue
        order = list(range(20))
        order[first], order[second] = second, first
        try:
            run = bind(tmp_path / "run", data=Subset(data, order))
            list(backwards(run, run.num_steps, 1000))
            taken.append((first, second))
        except MismatchError as error:
            told.add(str(error)[:29])
    assert not taken
    assert told == {"the order of the data differs"}


def test_a_stretch_that_drifts_is_forgotten_before_it_is_replayed_again(
    runs: dict[int, Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its gradients are compared in a second replay, which must not need the memory of both."""
    run, replayed, held = runs[7], Backwards._replayed, list[list[weakref.ref[Tensor]]]()

    def noted(self: Backwards, *args: Any, **options: Any) -> Any:
        alive = [ref() is not None for gradients in held for ref in gradients]
        held_on = 8  # the model's own and the moment handed out last: 4 tensors each
        assert sum(alive) <= held_on, f"{sum(alive)} of {len(alive)} gradients are still held"
        moments = replayed(self, *args, **options)
        held.append([weakref.ref(gradient) for _, gradients, _ in moments for gradient in gradients.values()])
        return moments

    differences = iter([1e-9])  # of the first stretch's end alone
    monkeypatch.setattr("hydragrad.trajectory.moments.state_difference", lambda *_: next(differences, 0.0))
    monkeypatch.setattr(Backwards, "_replayed", noted)
    swept = backwards(run, STEPS, 1000)
    for stretch in swept.stretches():
        for _ in stretch:
            pass
    assert len(held) == 5  # four stretches, the last of them twice
    assert [drift for drift in swept.drift.values() if drift] == [1e-9]


def test_drift_is_relative_to_each_tensor_and_infinite_for_nan() -> None:
    def state(big: float, small: float, buffer: float) -> State:
        return State(
            3, {"big": torch.tensor([big, 1.0]), "small": torch.tensor([small])}, {"b": torch.tensor([buffer])}, {}
        )

    here = state(100.0, 1e-3, 2.0)
    assert state_difference(here, here) == 0.0
    assert state_difference(here, state(101.0, 1e-3, 2.0)) == pytest.approx(0.01)
    assert state_difference(here, state(100.0, 2e-3, 2.0)) == pytest.approx(1.0)
    assert state_difference(here, state(101.0, 1e-3, 1.0)) == pytest.approx(0.5)
    assert state_difference(here, state(100.0, math.nan, 2.0)) == math.inf


def test_checkpoints_on_disk_spare_replays(runs: dict[int, Run]) -> None:
    def replayed(spacing: int) -> int:
        swept = backwards(runs[spacing], STEPS, 4)
        moments: Iterator[Moment] = iter(swept)
        assert sum(1 for _ in moments) == STEPS
        return swept.replayed

    assert replayed(1) == replayed(4) == STEPS
    assert replayed(100) > STEPS
