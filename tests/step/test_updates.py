"""Conformance of every optimizer's pure update: equal to torch.optim, pure, and rightly differentiated.

The derivatives' reference is the dense Jacobian of the oracle's own formulas, never of the code under test.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import jacobian

from hydragrad.errors import UnsupportedError
from hydragrad.step import supported, update_for
from tests.step.options import OPTIONS, option_id
from tests.step.rules import RULES, full_hyper, initial_state
from tests.tolerances import LIMIT, ORACLE, SAME, UPDATE, assert_close

SHAPE, BLOCK = (3, 2), 3
DTYPES = [torch.float64, torch.float32]
every_option = pytest.mark.parametrize("option", OPTIONS, ids=option_id)


class Torch:
    """torch.optim on one parameter, fed given gradients; what it did so far in our terms."""

    def __init__(self, name: str, given: dict[str, Any], w: Tensor) -> None:
        self.param = nn.Parameter(w.clone())
        self.optimizer = getattr(torch.optim, name)([self.param], **given)

    @property
    def state(self) -> dict[str, Tensor]:
        return dict(self.optimizer.state.get(self.param, {}))

    def step(self, g: Tensor) -> None:
        self.param.grad = g.clone()
        self.optimizer.step()


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def slots_of(name: str, hyper: dict[str, Any], reference: Torch) -> dict[str, Tensor]:
    """The slots at this moment: torch's, or those before the first step."""
    start, _ = initial_state(name, reference.param.detach(), hyper)
    return {k: reference.state[k].clone() if reference.state.get(k) is not None else v for k, v in start.items()}


def at(option: tuple[str, dict[str, Any]], steps: int, alive: float | Tensor = 1.0) -> tuple:
    """(update, hyper, w, slots, g, scalars) after some steps of torch.optim along random gradients, 0 where dead."""
    name, given = option
    reference, update, hyper = (
        Torch(name, given, alive * random(*SHAPE, seed=0)),
        update_for(name),
        full_hyper(name, given),
    )
    for t in range(steps):
        reference.step(alive * random(*SHAPE, seed=10 + t))
    slots, scalars = slots_of(name, hyper, reference), update.scalars(reference.state)
    return update, hyper, reference.param.detach().clone(), slots, alive * random(*SHAPE, seed=10 + steps), scalars


def oracle_scalars(name: str, hyper: dict[str, Any], steps: int) -> dict[str, float]:
    w, g = torch.zeros(1), torch.ones(1)
    slots, scalars = initial_state(name, w, hyper)
    for _ in range(steps):
        w, slots, scalars = RULES[name](w, g, slots, hyper, scalars)
    return scalars


def dense_jacobian(name: str, hyper: dict, w: Tensor, slots: dict, g: Tensor, scalars: dict) -> Tensor:
    """Of the oracle's (w, slots, g) -> (w', slots'): a matrix `[(1 + s) n, (2 + s) n]`, each part flattened."""
    names, n = list(slots), w.numel()

    def flat(x: Tensor) -> Tensor:
        parts = [part.view(w.shape) for part in x.split(n)]
        after_w, after, _ = RULES[name](parts[0], parts[-1], dict(zip(names, parts[1:-1], strict=True)), hyper, scalars)
        return torch.cat([after_w.flatten(), *(after[k].flatten() for k in names)])

    found = jacobian(flat, torch.cat([w.flatten(), *(slots[k].flatten() for k in names), g.flatten()]))
    assert isinstance(found, Tensor)
    return found


def pulled(linear: Any, names: list[str], cotangent: Tensor) -> Tensor:
    """The VJP on rows `[K, (1 + s) n]`, as rows `[K, (2 + s) n]`."""
    lam, *sig = (part.reshape(-1, *SHAPE) for part in cotangent.chunk(1 + len(names), dim=1))
    w, slots, g = linear.vjp(lam, dict(zip(names, sig, strict=True)))
    assert sorted(slots) == sorted(names)
    return torch.cat([part.flatten(1) for part in (w, *(slots[k] for k in names), g)], dim=1)


def pushed(linear: Any, names: list[str], tangent: Tensor) -> Tensor:
    """The JVP on rows `[K, (2 + s) n]`, as rows `[K, (1 + s) n]`."""
    parts = [part.reshape(-1, *SHAPE) for part in tangent.chunk(2 + len(names), dim=1)]
    w, slots = linear.jvp(parts[0], dict(zip(names, parts[1:-1], strict=True)), parts[-1])
    assert sorted(slots) == sorted(names)
    return torch.cat([part.flatten(1) for part in (w, *(slots[k] for k in names))], dim=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_option
def test_trajectory_equals_torch_optim(option, dtype):
    name, given = option
    reference = Torch(name, given, random(*SHAPE, seed=0, dtype=dtype))
    update, hyper = update_for(name), full_hyper(name, given)
    w, slots = reference.param.detach().clone(), slots_of(name, hyper, reference)
    for t in range(12):  # enough for NAdam's product, which torch rounds to float32, to be rounded both ways
        g, scalars = random(*SHAPE, seed=10 + t, dtype=dtype), update.scalars(reference.state)
        w, slots = update.step(w, slots, g, hyper, scalars)
        reference.step(g)
        assert w.dtype == dtype
        assert_close(w, reference.param, UPDATE)
        assert set(slots) == set(update.slots(hyper))
        for slot, value in slots.items():
            assert_close(value, reference.state[slot], UPDATE)


@every_option
def test_slots_and_scalars_are_those_of_torch(option):
    name, given = option
    update, hyper = update_for(name), full_hyper(name, given)
    expected, before_first = initial_state(name, torch.zeros(SHAPE), hyper)
    assert sorted(update.slots(hyper)) == sorted(expected)
    start = update.scalars({})
    assert {k: start[k] for k in before_first} == before_first
    if name == "SGD" and not hyper["momentum"]:
        return  # torch keeps no state at all, so there is no telling, and nothing depends on it
    for steps in (1, 3):
        found, expected = at(option, steps)[-1], oracle_scalars(name, hyper, steps)
        assert {k: found[k] for k in expected} == pytest.approx(expected, rel=1e-15)


@every_option
def test_step_and_linearization_change_no_input(option):
    update, hyper, w, slots, g, scalars = at(option, 2)
    given = [w, g, *slots.values()]
    kept, numbers = [x.clone() for x in given], (dict(hyper), dict(scalars))
    first, first_slots = update.step(w, slots, g, hyper, scalars)
    lam, sig = random(BLOCK, *SHAPE, seed=1), {k: random(BLOCK, *SHAPE, seed=2) for k in slots}
    directions = [lam, *sig.values()]
    kept_directions = [x.clone() for x in directions]
    linear = update.linearize(w, slots, g, hyper, scalars)
    linear.vjp(lam, sig)
    linear.jvp(lam, sig, lam)
    assert all(torch.equal(x, y) for x, y in zip(given + directions, kept + kept_directions, strict=True))
    assert (dict(hyper), dict(scalars)) == numbers
    again, again_slots = update.step(w, slots, g, hyper, scalars)
    assert torch.equal(first, again)
    assert all(torch.equal(first_slots[k], again_slots[k]) for k in slots)


@pytest.mark.parametrize("steps", [0, 1, 3])
@every_option
def test_vjp_and_jvp_equal_the_dense_jacobian(option, steps):
    update, hyper, w, slots, g, scalars = at(option, steps)
    if steps == 0 and hyper.get("amsgrad"):
        slots["max_exp_avg_sq"] = slots["max_exp_avg_sq"] - 1  # off the tie of max(0, 0): any derivative is right there
    dense = dense_jacobian(option[0], hyper, w, slots, g, oracle_scalars(option[0], hyper, steps))
    linear, names = update.linearize(w, slots, g, hyper, scalars), list(slots)
    cotangent, tangent = random(BLOCK, dense.shape[0], seed=3), random(BLOCK, dense.shape[1], seed=4)
    assert_close(pulled(linear, names, cotangent), cotangent @ dense, ORACLE)
    assert_close(pushed(linear, names, tangent), tangent @ dense.T, ORACLE)


@every_option
def test_each_entry_of_the_jacobian(option):
    """Unit vectors, each compared on the scale of its own block: a small derivative cannot hide behind a large one."""
    update, hyper, w, slots, g, scalars = at(option, 2)
    dense = dense_jacobian(option[0], hyper, w, slots, g, oracle_scalars(option[0], hyper, 2))
    found = pulled(update.linearize(w, slots, g, hyper, scalars), list(slots), torch.eye(dense.shape[0], dtype=w.dtype))
    n = w.numel()
    for rows, expected_rows in zip(found.split(n), dense.split(n), strict=True):
        for block, expected in zip(rows.split(n, dim=1), expected_rows.split(n, dim=1), strict=True):
            assert_close(block, expected, ORACLE)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_option
def test_vjp_and_jvp_are_dual(option, dtype):
    update, hyper, w, slots, g, scalars = at(option, 3)
    w, g, slots = w.to(dtype), g.to(dtype), {k: s.to(dtype) for k, s in slots.items()}
    linear, names, n = update.linearize(w, slots, g, hyper, scalars), list(slots), w.numel()
    x = random(BLOCK, (2 + len(names)) * n, seed=5, dtype=dtype)
    y = random(BLOCK, (1 + len(names)) * n, seed=6, dtype=dtype)
    back, forth = pulled(linear, names, y), pushed(linear, names, x)
    assert back.dtype == forth.dtype == dtype
    scale = (y * forth).abs().sum(1)  # of the terms that are summed: they cancel
    assert_close((back * x).sum(1) / scale, (y * forth).sum(1) / scale, {k: 50 * v for k, v in SAME.items()})


@every_option
def test_derivative_where_the_second_moment_is_zero(option):
    """g = 0 at the first step (dead units, unseen embedding rows): finite, and the limit of torch's own step."""
    name, given = option
    update, hyper = update_for(name), full_hyper(name, given)
    w = g = torch.zeros(SHAPE, dtype=torch.float64)
    slots, scalars = initial_state(name, w, hyper)[0], update.scalars({})
    linear, names = update.linearize(w, slots, g, hyper, scalars), list(slots)
    after, _ = update.step(w, slots, g, hyper, scalars)
    assert after.isfinite().all()
    tangent = random(BLOCK, (2 + len(names)) * w.numel(), seed=7)
    assert pushed(linear, names, tangent).isfinite().all()

    lam = random(BLOCK, *SHAPE, seed=8)
    *_, gam = linear.vjp(lam, {k: torch.zeros_like(lam) for k in names})
    _, pulled_slots, _ = linear.vjp(lam, {k: random(BLOCK, *SHAPE, seed=9) for k in names})
    assert all(s.isfinite().all() for s in pulled_slots.values())
    h, ends = 1e-4 * hyper.get("eps", 1.0), []
    for sign in (1, -1):
        reference = Torch(name, given, w)
        reference.step(torch.full_like(g, sign * h))
        ends.append(reference.param.detach())
    assert_close(gam, lam * (ends[0] - ends[1]) / (2 * h), LIMIT)


@every_option
def test_second_moment_zero_in_single_entries(option):
    """Zero entries beside others: the others' derivatives stay those of the dense Jacobian."""
    update, hyper, w, slots, g, scalars = at(option, 2, torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 1.0]]).double())
    dense = dense_jacobian(option[0], hyper, w, slots, g, oracle_scalars(option[0], hyper, 2))
    n = w.numel()
    lam = torch.cat([random(BLOCK, n, seed=3), torch.zeros(BLOCK, dense.shape[0] - n, dtype=w.dtype)], dim=1)
    found = pulled(update.linearize(w, slots, g, hyper, scalars), list(slots), lam)
    expected = lam @ dense
    assert found.isfinite().all()
    alive = (g != 0).flatten()
    for part, expected_part in ((found[:, :n], expected[:, :n]), (found[:, -n:], expected[:, -n:])):
        assert_close(part[:, alive], expected_part[:, alive], ORACLE)
        assert_close(part[:, ~alive], expected_part[:, ~alive], ORACLE)


@every_option
def test_torch_continues_from_our_slots(option):
    """Two steps of ours, then torch.optim from our state, equals torch.optim all along."""
    name, given = option
    whole, update, hyper = Torch(name, given, random(*SHAPE, seed=0)), update_for(name), full_hyper(name, given)
    w, slots = whole.param.detach().clone(), slots_of(name, hyper, whole)
    for t in range(2):
        w, slots = update.step(w, slots, random(*SHAPE, seed=10 + t), hyper, update.scalars(whole.state))
        whole.step(random(*SHAPE, seed=10 + t))
    resumed = Torch(name, given, w)
    if whole.state:  # set directly: load_state_dict would turn NAdam's mu_product into another dtype
        resumed.optimizer.state[resumed.param] = {k: v.clone() for k, v in {**whole.state, **slots}.items()}
    for t in (2, 3):
        whole.step(random(*SHAPE, seed=10 + t))
        resumed.step(random(*SHAPE, seed=10 + t))
    assert_close(resumed.param, whole.param, UPDATE)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (2, 3, 1, 2)], ids=str)
@pytest.mark.parametrize("name", sorted(RULES))
def test_any_shape(name, shape):
    hyper = full_hyper(name, {"lr": 0.1})
    w, g = random(*shape, seed=1), random(*shape, seed=2)
    slots, before_first = initial_state(name, w, hyper)
    expected, _, _ = RULES[name](w, g, slots, hyper, before_first)
    scalars = update_for(name).scalars({})
    after, _ = update_for(name).step(w, slots, g, hyper, scalars)
    assert_close(after, expected, UPDATE)
    lam = random(BLOCK, *shape, seed=3)
    pulled_w, _, gam = update_for(name).linearize(w, slots, g, hyper, scalars).vjp(lam, dict.fromkeys(slots, lam))
    assert pulled_w.shape == gam.shape == lam.shape


def test_every_optimizer_of_the_oracle_is_supported():
    assert set(RULES) <= set(supported())


def test_an_unknown_optimizer_is_refused_with_the_list_of_the_known():
    with pytest.raises(UnsupportedError) as refused:
        update_for("LBFGS")
    assert all(name in str(refused.value) for name in ("LBFGS", *RULES))
