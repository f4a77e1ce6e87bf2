"""Counting allocations: by hand on plain operations, and what a plan predicts against what a sweep allocates."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils import _pytree as pytree
from torch.utils.data import TensorDataset

import hydragrad as hg
from hydragrad import attributing, planning
from hydragrad.hypergradient import allocations, choosing, rehearsing
from hydragrad.hypergradient.allocations import Allocations
from hydragrad.hypergradient.pages import kept_pages
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.trajectory.state import State
from hydragrad.trajectory.store import Trajectory
from tests.hypergradient.classifying import losses, train
from tests.hypergradient.recorded import least_memory


def test_live_and_peak_by_hand() -> None:
    with Allocations() as counted:
        x = torch.ones(1000)
        y = x + 1
        assert (counted.live, counted.peak) == (8000, 8000)
        del y
        assert (counted.live, counted.peak) == (4000, 8000)
        x.add_(1)
        z = x.view(10, 100)
        assert counted.live == 4000  # in place, and a view: nothing new
        del x
        assert counted.live == 4000
        del z
        assert (counted.live, counted.peak) == (0, 8000)


def test_what_was_there_before_is_not_counted() -> None:
    x = torch.ones(1000)
    with Allocations() as counted:
        y = x.mul_(2)
    assert counted.peak == 0
    assert y is x


def test_inside_transforms_and_backward_passes() -> None:
    model, inputs = nn.Linear(100, 50), torch.rand(8, 100)
    params = {name: p.detach() for name, p in model.named_parameters()}
    with Allocations() as counted:
        tangents = {name: torch.rand(16, *p.shape) for name, p in params.items()}
        before = counted.live
        assert before == 16 * 5050 * 4

        def slope(at: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return grad(lambda p: functional_call(model, p, (inputs,)).square().sum())(at)

        out = vmap(lambda t: jvp(slope, (params,), (t,))[1])(tangents)
        assert counted.live - before == 16 * 5050 * 4
        assert counted.peak - before > 2 * 16 * 50 * 8 * 4
        del out
        assert counted.live == before
        model(inputs).sum().backward()
        assert counted.live - before == 5050 * 4  # the gradients stay


STEPS, EVERY, QUERIES, BLOCK = 64, 16, 8, 4
ENGINES = {"exact": "reverse-over-reverse", "gauss-newton": "jvp-then-vjp", "hessian-free": "jvp"}


@pytest.fixture(scope="module", params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(scope="module", params=["SGD", "Adam"])
def run(request: pytest.FixtureRequest, dtype: torch.dtype, tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    """50,826 parameters, four stretches of 16 steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 10)).to(dtype)
    given = {"momentum": 0.9} if request.param == "SGD" else {}
    optimizer = getattr(torch.optim, request.param)(model.parameters(), lr=1e-3, **given)
    data = TensorDataset(torch.rand(64, 64, dtype=dtype), torch.randint(0, 10, (64,)))
    folder = tmp_path_factory.mktemp("allocations") / "run"
    train(folder, model, optimizer, data, 8, STEPS, EVERY)
    return hg.load(folder, model=model, loss=losses, data=data)


def _cloned(state: State) -> State:
    params, buffers, optimizer = pytree.tree_map(torch.clone, (state.params, state.buffers, state.optimizer))
    return replace(state, params=params, buffers=buffers, optimizer=optimizer)


def counted_loads(patch: pytest.MonkeyPatch) -> None:
    """States read from files come from no operation: clones stand for them, so that they are counted."""
    plain = Trajectory.state

    def state(trajectory: Trajectory, step: int) -> State:
        return _cloned(plain(trajectory, step))

    patch.setattr(Trajectory, "state", state)


@pytest.mark.parametrize("tight", [None, 2.0, 1.2])
@pytest.mark.parametrize("method", ENGINES)
def test_a_plan_predicts_what_a_sweep_allocates(
    run: hg.Run, dtype: torch.dtype, method: str, tight: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The result, adjoints, states kept, copies of the model, a block's work: within 8 % where there is room for all.

    Under a tight budget, planning included, within a quarter: the work of fewer queries than a block is interpolated.
    """
    allowed = 0.08 if tight is None else 0.25
    plans = list[hg.Plan]()

    def choose(sweep: Sweep, *_: Any, **__: Any) -> Any:
        return choosing.fixed(sweep, method, f"plain:{ENGINES[method]}", BLOCK)

    def noted(*args: Any, **given: Any) -> hg.Plan:
        plans.append(planning.plan_sweep(*args, **given))
        return plans[-1]

    monkeypatch.setattr(planning, "choose", choose)
    monkeypatch.setattr(attributing, "plan_sweep", noted)
    monkeypatch.setattr(allocations, "resident", lambda: 0)  # as where it cannot be read: what is allocated alone
    counted_loads(monkeypatch)
    queries = [(torch.rand(64, dtype=dtype), torch.tensor(j % 10)) for j in range(QUERIES)]
    memory = None if tight is None else int(tight * least_memory(run, QUERIES, method))
    run.memo.clear()
    with Allocations() as counted:
        hg.attribute(run, queries, method=method, memory=memory, check=False, progress=False)
    (plan,) = plans
    assert plan.peak_bytes <= plan.budget
    assert plan.peak_bytes == pytest.approx(counted.peak, rel=allowed), f"{plan.peak_bytes / counted.peak:.2f} {plan}"


@pytest.mark.skipif(not allocations.resident(), reason="resident memory cannot be read here")
def test_resident_memory_is_seen_to_rise_and_free_memory_is_given_back_before() -> None:
    size = 20 * 2**20  # below what malloc takes from the system piece by piece: the heap keeps it
    with kept_pages():
        for _ in range(2):  # the second time as much is free
            with Allocations() as counted:
                torch.ones(size // 4)
            assert counted.peak == size
            assert size * 0.9 < counted.risen < size * 1.5


def test_a_plan_counts_what_a_heap_holds_beyond_the_tensors(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resident memory that stands 1 GiB above what it was, in place of the process's own."""
    queries = [(torch.rand(64), torch.tensor(j % 10)) for j in range(QUERIES)]
    height = 2**30
    above: Iterator[int] = iter(())

    def given_back() -> None:
        nonlocal above
        above = itertools.chain([0], itertools.repeat(height))

    def planned() -> int:
        run.memo.clear()
        return hg.plan(run, len(queries), "exact", block=BLOCK, compile=False).peak_bytes

    monkeypatch.setattr(rehearsing, "SHARE", 5.0)  # as a long sweep is rehearsed
    monkeypatch.setattr(allocations, "resident", lambda: 0)
    plain = planned()
    monkeypatch.setattr(allocations, "give_back", given_back)
    monkeypatch.setattr(allocations, "resident", lambda: next(above))
    assert planned() == plain < rehearsing.SMALL  # not looked at
    monkeypatch.setattr(rehearsing, "SMALL", 0)
    work = height // 10  # what the passes themselves hold is far less
    assert height - work < planned() - plain <= height
