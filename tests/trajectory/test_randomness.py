"""Random numbers drawn inside steps: recorded from where, drawn again in replay, the caller's generators left alone."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hydragrad as hg
from hydragrad.errors import MismatchError
from hydragrad.run import Run
from hydragrad.trajectory.generators import GENERATORS
from hydragrad.trajectory.moments import Backwards, forwards
from hydragrad.trajectory.randomness import RandomState, RandomWatch, Seeding, number_of, seeded, undisturbed
from hydragrad.trajectory.recording import record
from hydragrad.verification import verify
from tests.trajectory.loops import (
    N,
    assert_same_params,
    bind,
    losses,
    make_data,
    make_model,
    params_of,
    record_run,
    sgd,
)

CPU = torch.device("cpu")
DRAWS: dict[str, Callable[[], Any]] = {
    "torch": lambda: torch.rand(1).item(),
    "numpy": lambda: np.random.rand(),
    "numpy-normal": lambda: np.random.standard_normal(),  # draws two, keeps one for the next call
    "python": lambda: random.random(),
    "python-gauss": lambda: random.gauss(0, 1),
}


def everything() -> list[Any]:
    """What comes next from every generator, kept normal numbers included."""
    return [draw() for draw in DRAWS.values() for _ in range(3)]


@pytest.mark.parametrize("kept", [False, True])
def test_a_state_is_captured_and_restored_without_a_trace(kept: bool) -> None:
    if kept:
        np.random.standard_normal()
        random.gauss(0, 1)
    state = RandomState.capture()
    first = everything()
    with undisturbed():
        with state.restored():
            assert everything() == first
        after = everything()
    assert everything() == after != first
    again = RandomState.of({name: tensor.clone() for name, tensor in state.tensors().items()})
    with again.restored():
        assert everything() == first
    assert set(state.tensors()) == set(GENERATORS) - {"cuda"}


def test_seeds_by_key() -> None:
    before = RandomState.capture()
    with seeded("a", 1):
        one = everything()
    with seeded("a", 2):
        two = everything()
    with seeded("a", 1):
        assert everything() == one
    assert all(a != b for a, b in zip(one, two, strict=True))
    for name, tensor in RandomState.capture().tensors().items():
        assert torch.equal(tensor, before.tensors()[name])


@pytest.mark.parametrize("name", DRAWS)
def test_every_draw_is_seen_also_of_a_kept_number(name: str) -> None:
    watch, generator = RandomWatch(CPU), name.split("-")[0]
    for _ in range(5):
        watch.begin()
        assert watch.end() is None
        watch.begin()
        DRAWS[name]()
        drawn = watch.end()
        assert drawn is not None
        assert set(drawn[0]) == set(drawn[1]) == {generator}
        for draw in DRAWS.values():
            draw()  # between two batches: nobody's matter


def test_a_kept_normal_number_that_goes_is_a_draw() -> None:
    watch = RandomWatch(CPU)
    for _ in range(4):  # every second one changes nothing but that
        watch.begin()
        np.random.standard_normal()
        drawn = watch.end()
        assert drawn is not None
        assert set(drawn[0]) == {"numpy"}


def test_a_twister_that_takes_the_place_of_numpys_is_followed() -> None:
    watch, module = RandomWatch(CPU), np.random
    before: Any = module.get_bit_generator()  # type: ignore[attr-defined]
    try:
        for seed in (1, 2):
            watch.begin()
            assert watch.end() is None
            module.set_bit_generator(np.random.MT19937(seed))  # type: ignore[attr-defined]
            watch.begin()
            np.random.rand()
            drawn = watch.end()
            assert drawn is not None
            assert set(drawn[0]) == {"numpy"}
    finally:
        module.set_bit_generator(before)  # type: ignore[attr-defined]


def test_draws_that_bring_a_twister_back_to_its_place_are_seen() -> None:
    watch = RandomWatch(CPU)
    whole_turns: dict[str, Callable[[], Any]] = {
        "numpy": lambda: np.random.bytes(4 * 624),
        "python": lambda: random.getrandbits(32 * 624),
        "torch": lambda: torch.empty(624, dtype=torch.int32).random_(),
    }
    for name, draw in whole_turns.items():
        for turns in (1, 2):
            watch.begin()
            for _ in range(turns):
                draw()
            drawn = watch.end()
            assert drawn is not None, name
            assert set(drawn[0]) == {name}


@pytest.mark.parametrize("name", ["torch", "numpy", "python"])
def test_a_normal_number_that_is_kept_comes_back_with_its_state(name: str) -> None:
    draw = {"torch": lambda: torch.randn(1), "numpy": np.random.standard_normal, "python": lambda: random.gauss(0, 1)}
    draw[name]()  # the second of the pair is kept
    keeping = RandomState.capture().tensors()
    draw[name]()
    used = RandomState.capture().tensors()
    assert not torch.equal(used[name], keeping[name])
    for states in (keeping, used, keeping):
        RandomState.of(states).set()
        assert torch.equal(RandomState.capture().tensors()[name], states[name])
    with undisturbed():
        draw[name]()
        RandomState.capture()
    assert torch.equal(RandomState.capture().tensors()[name], keeping[name])


@pytest.mark.parametrize("drawing", [*DRAWS, "all", "none", "sometimes"])
def test_seeding_many_calls_gives_what_seeding_each_gives(drawing: str) -> None:
    def draw(i: int) -> list[Any]:
        if drawing == "all":
            return everything()
        return [DRAWS[drawing]()] if drawing in DRAWS else [random.random()] if drawing == "sometimes" and i > 2 else []

    expected = []
    for i in range(6):
        with seeded("many", i):
            expected.append(draw(i))
    for _ in range(2):
        np.random.standard_normal()
        random.gauss(0, 1)
        before, seeding = RandomState.capture().tensors(), Seeding()
        assert seeding.each(draw, range(6), [number_of("many", i) for i in range(6)]) == expected
        for name, tensor in RandomState.capture().tensors().items():
            assert torch.equal(tensor, before[name]), name


def dropping() -> nn.Module:
    """The ordinary model with dropout before its last layer."""
    layers = list(make_model())
    return nn.Sequential(*layers[:2], nn.Dropout(0.4), layers[2])


def torch_noise(model: nn.Module, batch: Any) -> Tensor:
    points, labels = batch
    return losses(model, (points + 0.1 * torch.randn_like(points), labels))


def numpy_mixup(model: nn.Module, batch: Any) -> Tensor:
    points, labels = batch
    share = float(np.random.beta(0.4, 0.4))
    order = torch.from_numpy(np.random.permutation(len(labels)))
    mixed = share * points + (1 - share) * points[order]
    return share * losses(model, (mixed, labels)) + (1 - share) * losses(model, (mixed, labels[order]))


def python_scale(model: nn.Module, batch: Any) -> Tensor:
    return losses(model, batch) * (1 + 0.2 * random.gauss(0, 1))


KINDS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "dropout": (dropping, losses),
    "torch-noise": (make_model, torch_noise),
    "numpy-mixup": (make_model, numpy_mixup),
    "python": (make_model, python_scale),
    "all": (dropping, lambda m, b: numpy_mixup(m, b) + torch_noise(m, b) + python_scale(m, b)),
}


def trained(kind: str, path: Path, *, weights: Tensor | None = None, own: bool = True, every: int = 4) -> nn.Module:
    """A loop of two micro-batches a step; draws outside the steps as well. ``weights``: not recorded, by hand."""
    build, loss = KINDS[kind]
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    model = build()
    optimizer = sgd(model)
    generator = torch.Generator().manual_seed(2) if own else None
    loader = DataLoader(make_data(), 4, shuffle=True, generator=generator)
    numbers = DataLoader(range(N), 4, shuffle=True, generator=torch.Generator().manual_seed(2))  # type: ignore[arg-type]

    def loop(batches: Any) -> None:
        for _ in range(3):
            for place, (batch, ids) in enumerate(zip(batches, numbers, strict=True)):
                values = loss(model, batch)
                (values if weights is None else values * weights[ids]).mean().backward()
                if place % 2:
                    optimizer.step()
                    optimizer.zero_grad()
                    if place == 3:
                        everything()

    if weights is not None:
        loop(loader)
        return model
    with record(path, model, optimizer, checkpoint_every=every) as recording:
        loop(recording.batches(loader))
    return model


def bound(kind: str, path: Path) -> Run:
    build, loss = KINDS[kind]
    return bind(path, model=build(), loss=loss)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_random_steps_replay_bit_for_bit(kind: str, own: bool, tmp_path: Path) -> None:
    model = trained(kind, tmp_path / "run", own=own)
    before = RandomState.capture().tensors()
    run = bound(kind, tmp_path / "run")
    assert all(step.random for step in run.steps)
    found = verify(run)
    assert found.exact, found
    assert_same_params(run.replay().params, params_of(model))
    assert_same_params(run.replay(torch.ones(N)).params, params_of(model))
    for state in run.states(5, 8):
        assert state.step in (5, 6, 7)
    for name, tensor in RandomState.capture().tensors().items():
        if name != "python":  # the type checks that run while testing draw from it
            assert torch.equal(tensor, before[name])


@pytest.mark.parametrize("kind", KINDS)
def test_weights_change_no_random_number(kind: str, tmp_path: Path) -> None:
    trained(kind, tmp_path / "run")
    run = bound(kind, tmp_path / "run")
    for removed in (0, 13):
        weights = torch.ones(N)
        weights[removed] = 0.0
        expected = trained(kind, tmp_path / "none", weights=weights)
        assert_same_params(run.replay(weights).params, params_of(expected))


@pytest.mark.parametrize("most", [2, 3, 1000])
@pytest.mark.parametrize("kind", ["dropout", "all"])
def test_moments_carry_the_state_that_draws_the_same_again(kind: str, most: int, tmp_path: Path) -> None:
    trained(kind, tmp_path / "run", every=5)
    run = bound(kind, tmp_path / "run")
    found = [*Backwards(run.replayer(), run.trajectory, run.num_steps, most)]
    found += forwards(run.replayer(), run.trajectory, run.num_steps)
    assert len(found) == 2 * run.num_steps == 18
    model, loss = KINDS[kind][0](), KINDS[kind][1]
    for moment in found:
        model.load_state_dict({**moment.state.params, **moment.state.buffers})
        model.zero_grad()
        for (_, batch), state in zip(moment.batches, moment.random, strict=True):
            assert state is not None
            with state.restored():
                loss(model, batch).mean().backward()
        for name, param in model.named_parameters():
            assert param.grad is not None
            assert torch.equal(param.grad, moment.gradient[name])


def test_states_are_stored_once_where_they_do_not_follow(tmp_path: Path) -> None:
    trained("dropout", tmp_path / "own", every=4)  # 9 steps of two: segments of 4, 4 and 1
    steps = bound("dropout", tmp_path / "own").steps
    stored = [[bool(draw) and draw["torch"] is not None for draw in step.draws] for step in steps]
    assert [step for step, (first, _) in enumerate(stored) if first] == [0, 2, 4, 5, 8]  # checkpoints; other draws
    assert not any(second for _, second in stored)
    assert all(draw is not None and set(draw) == {"torch"} for step in steps for draw in step.draws)


def test_what_a_skipped_batch_drew_is_not_drawn_again(tmp_path: Path) -> None:
    model = dropping()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(make_data(), 3))):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            if place not in (1, 4, 5):
                optimizer.step()
    run = bind(tmp_path / "run", model=dropping())
    assert [len(step.skipped) for step in run.steps] == [0, 1, 0, 2, 0]
    assert verify(run).exact, verify(run)
    assert_same_params(run.replay().params, params_of(model))


@pytest.mark.parametrize("kind", ["dropout", "all"])
def test_what_the_loop_draws_after_a_backward_pass_is_its_own(kind: str, tmp_path: Path) -> None:
    """Between accumulated micro-batches, and between the last of them and its step."""
    build, loss = KINDS[kind]
    model = build()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(make_data(), 3))):
            loss(model, batch).mean().backward()
            everything()
            if place % 2:
                optimizer.step()
                optimizer.zero_grad()
                everything()
    run = bound(kind, tmp_path / "run")
    assert verify(run).exact, verify(run)
    assert_same_params(run.replay().params, params_of(model))


def test_a_model_that_draws_late_beside_its_loop_is_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After batches that drew nothing it is not looked where a draw ends; the next one's state is then stored."""
    monkeypatch.setattr("hydragrad.trajectory.randomness._IDLE", 2)
    model = dropping()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(make_data(), 2))):
            model.train(place > 3)
            losses(model, batch).mean().backward()
            if place > 3:
                everything()
            if place % 2:
                optimizer.step()
                optimizer.zero_grad()
    run = bound("dropout", tmp_path / "run")
    stored = [[draw and draw["torch"] is not None for draw in step.draws] for step in run.steps]
    assert stored == [[None, None], [None, None], *[[True, True]] * (run.num_steps - 2)]
    assert verify(run).exact, verify(run)
    assert_same_params(run.replay().params, params_of(model))


def test_noise_that_the_loop_adds_later_in_the_run_is_met_at_its_step(tmp_path: Path) -> None:
    """Only in the second micro-batch of step 2: loading takes the first step alone."""
    model = make_model()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        for place, (points, labels) in enumerate(recording.batches(DataLoader(make_data(), 3))):
            noise = torch.randn_like(points) if place == 5 else torch.zeros_like(points)
            losses(model, (points + noise, labels)).mean().backward()
            if place % 2:
                optimizer.step()
                optimizer.zero_grad()
    run = bind(tmp_path / "run")
    words = r"gradient at step 2 differs.*random numbers were drawn inside the step.*inside loss\("
    assert verify(run).first_difference == 2
    with pytest.raises(MismatchError, match=words):
        run.replay()
    with pytest.raises(MismatchError, match=words):
        hg.attribute(run, make_data(3), progress=False, check=False)


def test_numbers_drawn_in_the_loop_but_not_in_the_loss_are_named(tmp_path: Path) -> None:
    model = make_model()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        for points, labels in recording.batches(DataLoader(make_data(), 4)):
            optimizer.zero_grad()
            losses(model, (points + torch.randn_like(points), labels)).mean().backward()
            optimizer.step()
    with pytest.raises(Exception, match=r"step 0 differs.*random numbers were drawn inside the step.*inside loss\("):
        bind(tmp_path / "run")


def test_plain_runs_store_no_states(tmp_path: Path) -> None:
    record_run(tmp_path / "run")
    assert not any(step.random for step in bind(tmp_path / "run").steps)
