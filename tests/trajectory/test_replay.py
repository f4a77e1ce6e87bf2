"""Replay takes the recorded steps again, bit for bit; weights multiply losses and touch nothing else."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, Subset, default_collate

from hydragrad.errors import MismatchError, NonFiniteError
from hydragrad.trajectory.batches import BatchSource
from hydragrad.trajectory.optimizers import rewrites_gradients
from hydragrad.trajectory.recording import record
from hydragrad.verification import verify
from tests.step.options import OPTIONS
from tests.trajectory.loops import (
    CLASSES,
    FEATURES,
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


def two_groups(model: nn.Module) -> Optimizer:
    """Two groups whose order is not the model's."""
    first, *rest = model.parameters()
    return torch.optim.SGD([{"params": rest, "lr": 0.05, "momentum": 0.5}, {"params": [first]}], lr=0.1)


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "sgd-momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, dampening=0.1, weight_decay=0.01),
    "sgd-nesterov": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=True),
    "sgd-tensor-lr": lambda m: torch.optim.SGD(m.parameters(), lr=torch.tensor(0.1), maximize=True),
    "adam": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, weight_decay=0.1),
    "adam-tensor-lr": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor(0.01)),
    "adam-double-lr": lambda m: torch.optim.Adam(m.parameters(), lr=torch.tensor([0.01], dtype=torch.float64)),
    "adamw-tensors": lambda m: torch.optim.AdamW(
        m.parameters(), lr=torch.tensor(0.01), betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False
    ),
    "adam-fused": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True),
    "adamw-amsgrad": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, amsgrad=True),
    "rmsprop": lambda m: torch.optim.RMSprop(m.parameters(), lr=0.01, centered=True, momentum=0.9),
    "adagrad": lambda m: torch.optim.Adagrad(m.parameters(), lr=0.1, lr_decay=0.1, initial_accumulator_value=0.2),
    "nadam": lambda m: torch.optim.NAdam(m.parameters(), lr=0.01),
    "adadelta": lambda m: torch.optim.Adadelta(m.parameters()),
    "asgd": lambda m: torch.optim.ASGD(m.parameters(), t0=2),
    "two-groups": two_groups,
}


@pytest.mark.filterwarnings("ignore:a run of .* cannot be differentiated yet")  # nor is it here
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_replay_is_bit_for_bit(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, data = make_model(dtype), make_data(dtype=dtype)
    optimizer = OPTIMIZERS[name](model)
    record_run(tmp_path / "run", model, optimizer, data)
    run = bind(tmp_path / "run", model=make_model(dtype), data=data)
    end = run.replay()
    assert_same_params(end.params, params_of(model))
    for param_name, param in model.named_parameters():
        for slot, value in optimizer.state[param].items():
            if value is not None:
                assert torch.equal(end.optimizer[param_name][slot], value), slot
    assert verify(run).exact
    for state in run.states(6, 10):  # from the checkpoint at 4: optimizer state goes through the disk
        if state.step == 8:
            assert_same_params(state.params, run.trajectory.state(8).params)
            stored = run.trajectory.state(8).optimizer
            for param_name, slots in state.optimizer.items():
                assert_same_params(slots, stored[param_name])


class Tied(nn.Module):
    """One weight in two places, one layer frozen, one unused, an integer buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.frozen = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second, self.unused, self.out = nn.Linear(6, 6), nn.Linear(2, 2), nn.Linear(6, 3)
        self.second.weight = self.first.weight
        self.frozen.requires_grad_(False)
        self.register_buffer("count", torch.tensor(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.second(torch.tanh(self.frozen(self.first(x)))))


def test_tied_frozen_and_unused_parameters_with_a_scheduler_and_a_thaw(tmp_path: Path) -> None:
    def build() -> Tied:
        torch.manual_seed(4)
        return Tied()

    model, data = build(), make_data()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=13)  # moves lr and betas
    with record(tmp_path / "run", model, optimizer, checkpoint_every=5) as recording:
        for epoch in range(2):
            for batch in recording.batches(DataLoader(data, 4)):
                model.zero_grad()
                losses(model, batch).mean().backward()
                optimizer.step()
                scheduler.step()
            if epoch == 0:
                model.frozen.requires_grad_(True)
    run = bind(tmp_path / "run", model=build())
    assert verify(run).exact, verify(run)
    assert_same_params(run.replay().params, params_of(model))
    assert {"unused.weight", "frozen.bias"} <= run.steps[0].without_grad
    assert "frozen.bias" not in run.steps[-1].without_grad
    assert run.steps[0].groups[0]["lr"] != run.steps[1].groups[0]["lr"]
    assert "second.weight" not in run.trajectory.state(0).params
    assert run.trajectory.state(0).buffers["count"] == 3


def test_modes_are_followed_step_by_step(tmp_path: Path) -> None:
    def build() -> nn.Sequential:
        return nn.Sequential(make_model(), nn.BatchNorm1d(3), nn.Dropout(0.5))

    model = build()
    model[2].eval()  # never drops anything
    optimizer = two_groups(model)
    with record(tmp_path / "run", model, optimizer, checkpoint_every=3) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(make_data(), 4))):
            model[1].train(place < 3)  # running statistics are frozen midway
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
    run = bind(tmp_path / "run", model=build())
    assert verify(run).exact, verify(run)
    assert [step.modes["1"] for step in run.steps] == [True] * 3 + [False] * 3
    assert not run.replayer().module[2].training  # pyright: ignore[reportIndexIssue]
    groups = [[name for name, _ in model.named_parameters()][1:], ["0.0.weight"]]
    assert run.trajectory.manifest.optimizer["groups"] == groups


def accumulate(
    model: nn.Module, optimizer: Optimizer, batches: Any, weights: Tensor | None = None, ids: Any = None
) -> None:
    """Two micro-batches of unequal sizes a step; the hand-written loop with weights that replay must equal."""
    for place, batch in enumerate(batches):
        values = losses(model, batch)
        if weights is not None:
            values = values * weights[ids[place]]
        values.mean().backward()
        if place % 2:
            optimizer.step()
            optimizer.zero_grad()


def test_weights_multiply_losses_and_leave_denominators(tmp_path: Path) -> None:
    data, ids = make_data(), [[0, 1, 2, 3], [4, 5], [6, 0, 0], [7, 8, 9], [10, 11], [12, 13, 14]]
    batches = [data[i] for i in ids]

    def trained(weights: Tensor | None) -> nn.Module:
        model = make_model()
        accumulate(model, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), batches, weights, ids)
        return model

    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    with record(tmp_path / "run", model, optimizer, checkpoint_every=1) as recording:
        accumulate(model, optimizer, recording.batches(batches, indices=ids))
    run = bind(tmp_path / "run")
    assert [len(step.batches) for step in run.steps] == [2, 2, 2]
    assert_same_params(run.replay(torch.ones(N)).params, params_of(model))
    for removed in (0, 8, 12, 21):
        weights = torch.ones(N)
        weights[removed] = 0.0
        expected = params_of(trained(weights))
        assert_same_params(run.replay(weights).params, expected)
        assert (removed == 21) == all(torch.equal(expected[n], p) for n, p in params_of(model).items())
    weights = torch.linspace(-1, 2, N)
    assert_same_params(run.replay(weights).params, params_of(trained(weights)))
    assert run.replay(weights, until=2).step == 2


def test_bad_weights_and_steps_are_refused(tmp_path: Path) -> None:
    record_run(tmp_path / "run", epochs=1)
    run = bind(tmp_path / "run")
    with pytest.raises(MismatchError, match=rf"shape \[{N}\].*shape \[3\]"):
        run.replay(torch.ones(3))
    with pytest.raises(NonFiniteError, match=r"not finite"):
        run.replay(torch.full((N,), float("nan")))
    with pytest.raises(MismatchError, match=r"0 to 5"):
        run.replay(until=6)
    with pytest.raises(MismatchError, match=r"steps out of order.*step 0.*step 2"):
        run.replayer().advance(run.steps[2])


def test_the_users_model_and_random_state_are_left_as_found(tmp_path: Path) -> None:
    record_run(tmp_path / "run", epochs=1)
    model = make_model().eval()
    first = next(model.parameters())
    calls: list[int] = []
    first.grad = torch.ones_like(first)
    before, state = {n: p.clone() for n, p in model.state_dict().items()}, torch.get_rng_state()
    model.register_forward_hook(lambda *_: calls.append(1))
    run = bind(tmp_path / "run", model=model)
    run.replay(torch.zeros(N))
    verify(run)
    assert_same_params(dict(model.state_dict()), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training
    assert torch.equal(first.grad, torch.ones_like(first))
    assert len(model._forward_hooks) == 1


class Pairs(Dataset):
    """Samples as dicts of a tensor and a number; counts how often it is asked."""

    def __init__(self) -> None:
        self.points, self.asked = torch.randn(9, 2), 0

    def __len__(self) -> int:
        return 9

    def __getitem__(self, index: int) -> dict[str, Any]:
        self.asked += 1
        return {"x": self.points[index], "y": (index, float(index))}


def test_fast_batches_equal_collated_ones() -> None:
    tensors, pairs = make_data(), Pairs()
    for data in (tensors, Subset(Subset(tensors, [5, 3, 8, 1, 9]), [4, 0, 2]), pairs):
        source = BatchSource(data, default_collate)
        for ids in ([2, 0], [1, 1, 2], [0, 1, 2], [2, 0]):
            expected = default_collate([data[i] for i in ids])
            for got in (source.fetch(torch.tensor(ids)), source.fetch(torch.tensor(ids), fresh=True)):
                leaves, spec = pytree.tree_flatten(got)
                wanted, wanted_spec = pytree.tree_flatten(expected)
                assert spec == wanted_spec
                assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(leaves, wanted, strict=True))
    asked = pairs.asked
    source.fetch(torch.tensor([0, 1, 2]))
    assert pairs.asked == asked  # kept rows
    with pytest.raises(MismatchError, match=r"no example among"):
        BatchSource([1, 2], default_collate).fetch(torch.tensor([5]))


class Assigning(nn.Module):
    """Keeps a moving average by putting a new tensor in the buffer's place; only evaluation reads it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(FEATURES, CLASSES)
        self.register_buffer("mean", torch.zeros(CLASSES))

    def forward(self, x: Tensor) -> Tensor:
        out = self.layer(x)
        if not self.training:
            return out - self.mean
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out


def test_a_buffer_that_is_assigned_is_recorded_and_replayed(tmp_path: Path) -> None:
    model = Assigning()
    loader = DataLoader(make_data(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(1))
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer, checkpoint_every=4) as recording:
        for batch in recording.batches(loader):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
    assert bool(model.mean.any())
    run = bind(tmp_path / "run", model=Assigning())
    assert torch.equal(run.trajectory.state(run.num_steps).buffers["mean"], model.mean)
    assert torch.equal(run.replay().buffers["mean"], model.mean)
    assert verify(run).exact


def test_a_tensor_for_a_learning_rate_that_a_scheduler_fills_and_the_loop_replaces(tmp_path: Path) -> None:
    """In place at every step; by another dtype and by a number later."""
    model, data = make_model(), make_data()
    optimizer = torch.optim.Adam(model.parameters(), lr=torch.tensor(0.01))
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)
    group, given = optimizer.param_groups[0], [torch.tensor(0.02, dtype=torch.float64), 0.03]

    def on_step() -> None:
        scheduler.step()
        if len(rates) in (3, 6):
            group["lr"] = given.pop(0)
        rates.append((type(group["lr"]), float(group["lr"])))

    rates: list[tuple[type, float]] = [(Tensor, float(torch.tensor(0.01)))]
    record_run(tmp_path / "run", model, optimizer, data, on_step=on_step)
    run = bind(tmp_path / "run", data=data)
    groups = [step.groups[0] for step in run.steps]
    named = [{name: dtype for name, dtype, *_ in group.get("tensors", ())} for group in groups]
    kinds = [Tensor if "lr" in tensors else float for tensors in named]
    assert list(zip(kinds, [group["lr"] for group in groups], strict=True)) == rates[:-1]
    assert [tensors.get("lr") for tensors in named[:7]] == ["float32"] * 3 + ["float64"] * 3 + [None]
    assert verify(run).exact


@pytest.mark.parametrize("way", [{"foreach": False}, {"foreach": True}, {"fused": True}], ids=str)
def test_it_is_known_which_updates_write_into_the_gradient(way: dict[str, bool]) -> None:
    """A replay keeps a copy of the gradient before those, and of no other: a copy costs a pass over memory."""
    wrote = set()
    for name, hyper in OPTIONS:
        if way.get("fused") and name not in ("SGD", "Adam", "AdamW", "Adagrad"):
            continue
        params = [torch.nn.Parameter(torch.linspace(-1, 1, 6).reshape(2, 3)), torch.nn.Parameter(torch.ones(2))]
        optimizer = getattr(torch.optim, name)(params, **hyper, **way)
        for _ in range(2):
            for param in params:
                param.grad = param.detach().cos()
            before = [param.grad.clone() for param in params if param.grad is not None]
            optimizer.step()
            same = all(torch.equal(g, p.grad) for g, p in zip(before, params, strict=True) if p.grad is not None)
            assert same or rewrites_gradients(optimizer), (name, hyper)
            wrote |= set() if same else {name}
    assert wrote == ({"SGD"} if way.get("foreach") else set())
