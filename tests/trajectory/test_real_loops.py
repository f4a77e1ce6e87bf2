"""What real training loops do besides the plain step: schedules, freezing, compiling, skipping."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

from hydragrad.errors import MismatchError
from hydragrad.trajectory.recording import Recording, record
from hydragrad.verification import verify
from tests.trajectory.loops import (
    CLASSES,
    bind,
    losses,
    make_data,
    make_model,
    sgd,
)
from tests.trajectory.real import assert_exact, normed, plain, recorded, seeded

# ---------------------------------------------------------------------------------------------------------------
# What is trained, and how fast


def test_freezing_and_unfreezing_and_the_live_model_in_its_final_form(tmp_path: Path) -> None:
    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        layers = model.requires_grad_(True)
        assert isinstance(layers, nn.Sequential)
        layers[0].requires_grad_(place >= 4)
        layers[4].requires_grad_(place < 9)
        optimizer.zero_grad(set_to_none=place % 2 == 0)  # zeros stay as gradients, and momentum goes on
        losses(model, batch).mean().backward()
        optimizer.step()

    model = normed()
    recorded(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1, 0.9, weight_decay=0.1), step)
    final = normed()
    final[4].requires_grad_(False)  # type: ignore[index]
    run = bind(tmp_path / "run", model=final)
    assert_exact(run, model)
    assert not final[4].weight.requires_grad  # type: ignore[index]
    assert [("4.weight" in s.without_grad, "4.weight" in s.frozen) for s in run.steps[8:]] == [
        (False, False),
        (False, True),
        (True, False),
        (True, False),
    ]


SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda t: 1 / (1 + t)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda t: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 5]),
    "constant": lambda o: lr_scheduler.ConstantLR(o, 0.5, 3),
    "linear": lambda o: lr_scheduler.LinearLR(o, 0.1, total_iters=4),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, 10, 2.0),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 8),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.2, 3, cycle_momentum=True),
    "one-cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.2, total_steps=12),
    "plateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.ExponentialLR(o, 0.9)], [3]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
}


@pytest.mark.parametrize("adam", [False, True], ids=["sgd", "adamw"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler(name: str, adam: bool, tmp_path: Path) -> None:
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02) if adam else sgd(model)
    scheduler = SCHEDULERS[name](optimizer)
    rates: list[float] = []

    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        rates.append(float(optimizer.param_groups[0]["lr"]))
        plain(recording, model, optimizer, batch, place)
        scheduler.step(*([1.0 + place] if name == "plateau" else []))

    recorded(tmp_path / "run", model, optimizer, step)
    run = bind(tmp_path / "run")
    assert [record.groups[0]["lr"] for record in run.steps] == rates
    assert len(set(rates)) > 1
    assert_exact(run, model)


def test_betas_and_decay_edited_by_hand(tmp_path: Path) -> None:
    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        group = optimizer.param_groups[0]
        group["betas"] = (0.5 + 0.03 * place, 0.9)
        group["weight_decay"] = 0.1 * (place % 3)
        plain(recording, model, optimizer, batch, place)

    model = make_model()
    recorded(tmp_path / "run", model, torch.optim.Adam(model.parameters(), 0.02), step)
    assert_exact(bind(tmp_path / "run"), model)


def test_betas_that_are_tensors_changed_where_they_lie(tmp_path: Path) -> None:
    first = torch.tensor(0.5)

    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        first.fill_(0.5 + 0.03 * place)
        plain(recording, model, optimizer, batch, place)

    model = make_model()
    optimizer = torch.optim.Adam(model.parameters(), 0.02, betas=(first, torch.tensor(0.9)), foreach=False)
    recorded(tmp_path / "run", model, optimizer, step)
    run = bind(tmp_path / "run")
    assert len({record.groups[0]["betas"] for record in run.steps}) > 1
    assert_exact(run, model)


# ---------------------------------------------------------------------------------------------------------------
# Compiled models, memory layouts


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled_models_are_known_by_the_names_of_the_original(inplace: bool, autocast: bool, tmp_path: Path) -> None:
    model = make_model()
    if inplace:
        model.compile(backend="eager")
    trained = model if inplace else torch.compile(model, backend="eager")
    assert isinstance(trained, nn.Module)

    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else contextlib.nullcontext():
            loss = losses(model, batch).mean()
        loss.backward()
        optimizer.step()

    call = model.__dict__.get("_compiled_call_impl")
    recorded(tmp_path / "run", trained, sgd(model), step)
    assert model.__dict__.get("_compiled_call_impl") is call
    for live in (make_model(), torch.compile(make_model(), backend="eager")):
        assert isinstance(live, nn.Module)
        run = bind(tmp_path / "run", model=live)
        assert list(run.trajectory.manifest.params) == [name for name, _ in model.named_parameters()]
        assert run.trajectory.manifest.extra["compiled"]
        assert run.half_precision is (torch.bfloat16 if autocast else None)
        assert_exact(run, model)


def test_a_compiled_runs_rounding_is_explained(tmp_path: Path) -> None:
    model = make_model()
    trained = torch.compile(model, backend="eager")
    assert isinstance(trained, nn.Module)
    recorded(tmp_path / "run", trained, sgd(model), plain)
    found = verify(bind(tmp_path / "run", loss=lambda m, b: losses(m, b) * (1 + 2**-20)))
    assert found.ok
    assert not found.exact
    assert "a compiled model was trained; its replay is not compiled" in str(found)


def test_dropout_that_a_compiler_draws_otherwise_is_named(tmp_path: Path) -> None:
    """As inductor does by default, this backend draws what the plain model would not."""

    def backend(graph: Any, inputs: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            torch.rand(1)
            return graph.forward(*args)

        return call

    model = normed()
    trained = torch.compile(model, backend=backend)
    assert isinstance(trained, nn.Module)
    recorded(tmp_path / "run", trained, sgd(model), plain)
    words = r"Likely cause: the model was compiled .* draws other numbers.*Remedy: .*backend='eager'.*fallback_random"
    with pytest.raises(MismatchError, match=words):
        bind(tmp_path / "run", model=normed())


def test_channels_last(tmp_path: Path) -> None:
    def build() -> nn.Module:
        return seeded(
            lambda: nn.Sequential(
                nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(4 * 36, CLASSES)
            )
        )

    generator = torch.Generator().manual_seed(1)
    data = TensorDataset(torch.randn(12, 3, 8, 8, generator=generator), torch.randint(0, CLASSES, (12,)))
    model = build().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with record(tmp_path / "run", model, optimizer, checkpoint_every=2) as recording:
        for batch in recording.batches(DataLoader(data, 4)):
            plain(recording, model, optimizer, batch, 0)
    live = build()
    run = bind(tmp_path / "run", model=live, data=data)
    assert_exact(run, model)
    strides = {name: p.stride() for name, p in model.named_parameters()}
    replayer = run.replayer()
    replayer.advance(run.steps[0])
    assert {name: p.stride() for name, p in replayer.module.named_parameters()} == strides
    state = next(iter(run.states(2, 3)))
    assert state.optimizer["0.weight"]["exp_avg"].stride() == strides["0.weight"] == (27, 1, 9, 3)
    assert live[0].weight.is_contiguous()  # type: ignore[index]


# ---------------------------------------------------------------------------------------------------------------
# Batches that the model ran on though no step came from them


def test_skipped_batches_that_moved_the_statistics_are_run_again(tmp_path: Path) -> None:
    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        model.train(place != 7)
        model.get_submodule("1").train(place not in (1, 7))  # no dropout in what is only looked at
        if place in (1, 7):
            losses(model, batch)  # looked at, not trained on; once without effect on the statistics
            return
        if place == 2:
            return  # not even looked at
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        if place not in (4, 5):  # their gradients are thrown away
            optimizer.step()

    torch.manual_seed(4)
    model = normed()
    recorded(tmp_path / "run", model, sgd(model), step)
    run = bind(tmp_path / "run", model=normed())
    assert [len(s.skipped) for s in run.steps] == [0, 2, 2, 1, 0, 0, 0]
    assert [len(s.passes) for s in run.steps] == [0, 1, 2, 0, 0, 0, 0]
    assert run.steps[2].random
    assert_exact(run, model)


def test_skipped_between_accumulated_ones(tmp_path: Path) -> None:
    """The order in which the statistics met the batches is kept."""

    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        loss = losses(model, batch).mean()
        if place % 3 != 1:
            loss.backward()
        if place % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()

    model = normed()
    recorded(tmp_path / "run", model, sgd(model), step)
    run = bind(tmp_path / "run", model=normed())
    assert [[one.place for one in s.passes] for s in run.steps] == [[1]] * 4
    assert_exact(run, model)


def test_changed_content_of_such_a_batch_is_seen(tmp_path: Path) -> None:
    seen: list[Tensor] = []

    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        optimizer.zero_grad()
        losses(model, batch).mean().backward()
        if place != 2:
            optimizer.step()
        seen.append(batch[0])

    model = normed()
    recorded(tmp_path / "run", model, sgd(model), step, epochs=1)
    run = bind(tmp_path / "run", model=normed())
    victim = int(run.steps[2].passes[0].ids[0])
    points, labels = (tensor.clone() for tensor in make_data().tensors)
    points[victim] += 1
    changed = bind(tmp_path / "run", model=normed(), data=TensorDataset(points, labels))
    with pytest.raises(MismatchError, match=f"at step 2.*example {victim}"):
        changed.replay()


def test_models_without_buffers_run_nothing_twice(tmp_path: Path) -> None:
    def step(recording: Recording, model: nn.Module, optimizer: Optimizer, batch: Any, place: int) -> None:
        loss = losses(model, batch).mean()
        if place != 3:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    model = make_model()
    recorded(tmp_path / "run", model, sgd(model), step)
    run = bind(tmp_path / "run")
    assert not any(s.passes for s in run.steps)
    assert_exact(run, model)
    assert not model._forward_pre_hooks
