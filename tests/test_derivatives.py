"""Torch's derivatives of a model against finite differences: right ones pass, wrong ones are found and told."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hydragrad as hg
from hydragrad.checks import RELIABLE
from hydragrad.derivatives import DERIVATIVES, derivative_error
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.trajectory.moments import forwards
from tests.hypergradient.recorded import recipe_of, recorded
from tests.zoo import CASES, case

PROBLEM = case("mlp_tanh")


def error_of(sweep: Sweep, method: str) -> float:
    moment = next(forwards(sweep.replayer, sweep.run.trajectory, 1))
    error = derivative_error(sweep.objective, next(points_of(moment, sweep.objective))[2], method)
    assert error is not None
    return error


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in CASES if name != "mlp_relu"])
def test_smooth_models_have_right_derivatives(name, dtype, tmp_path):
    sweep = Sweep.of(recorded(recipe_of(case(name, dtype)), tmp_path / "run"))
    for method in ("exact", "gauss-newton", "hessian-free"):
        assert error_of(sweep, method) < 1e-6, method


class WrongSecond(torch.autograd.Function):
    """sinh, whose backward is right and is itself differentiated wrongly: as cosh x instead of g sinh x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x)
        return x.sinh()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
        return WrongSlope.apply(g, *ctx.saved_tensors)  # type: ignore[return-value]


class WrongSlope(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(g, x)
        return g * x.cosh()

    @staticmethod
    def backward(ctx: Any, gg: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        g, x = ctx.saved_tensors
        return gg * x.cosh(), gg * g * x.cosh()  # should be sinh


class Sinh(nn.Module):
    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.wrong = wrong

    def forward(self, x: Tensor) -> Tensor:
        return WrongSecond.apply(x) if self.wrong else x.sinh()  # type: ignore[return-value]


def sinh_run(folder: Any, wrong: bool, lr: float = 0.01) -> hg.Run:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 6), Sinh(wrong), nn.Linear(6, 3)).double()
    recipe = recipe_of(PROBLEM, hyper={"lr": lr})
    groups = [([name for name, _ in model.named_parameters()], {"lr": lr})]
    return recorded(replace(recipe, model=model, groups=groups), folder / f"run {wrong}")


def test_a_wrong_second_derivative_is_found(tmp_path):
    right, wrong = (Sweep.of(sinh_run(tmp_path, w)) for w in (False, True))
    assert error_of(right, "exact") < 1e-6
    assert error_of(wrong, "exact") > 0.05
    assert error_of(wrong, "hessian-free") < 1e-6  # its first derivative is right


SEEN: list[int] = []


class Counted(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(len(x))
        return x


@pytest.mark.parametrize("dropping", [False, True])
def test_a_few_examples_of_a_large_batch_are_enough(tmp_path, dropping):
    for wrong in (False, True):
        layers = [nn.Linear(4, 6), Counted(), Sinh(wrong), nn.Dropout(0.3 if dropping else 0.0), nn.Linear(6, 3)]
        model = nn.Sequential(*layers).double()
        epochs = [[[list(range(12))]]] * 2
        groups = [([name for name, _ in model.named_parameters()], {"lr": 0.01})]
        recipe = recipe_of(PROBLEM, hyper={"lr": 0.01}, steps=[s for e in epochs for s in e])
        recipe = replace(recipe, model=model, groups=groups)
        sweep = Sweep.of(recorded(recipe, tmp_path / f"run {wrong}", epochs))
        SEEN.clear()
        found = error_of(sweep, "exact")
        assert (found > 0.01) == wrong, found
        assert SEEN.count(12) <= 3  # the step replayed and its losses' shape; then 8
        assert SEEN.count(8) >= 3


@pytest.mark.parametrize("check", [False, True])
def test_a_wrong_second_derivative_makes_scores_doubtful(tmp_path, check):
    """The small learning rate hides it from retraining: five examples removed are predicted well all the same."""
    for wrong in (False, True):
        diagnostics = hg.attribute(sinh_run(tmp_path, wrong), PROBLEM.queries, check=check, progress=False).diagnostics
        assert not diagnostics.finite_difference_error > RELIABLE
        assert diagnostics.verdict == ("doubtful" if wrong else "reliable" if check else "unchecked")
        told = [reason for reason in diagnostics.reasons if "wrong second derivative" in reason]
        assert len(told) == wrong
        assert diagnostics.derivative_error is not None
        assert (diagnostics.derivative_error > DERIVATIVES) == wrong


class OnlySingle(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            raise RuntimeError("no float64 kernel")
        return x.tanh()


def test_a_model_without_float64_is_not_judged_by_its_derivatives(tmp_path):
    problem = case("mlp_tanh", torch.float32)
    model = nn.Sequential(nn.Linear(4, 6), OnlySingle(), nn.Linear(6, 3))
    run = recorded(replace(recipe_of(problem), model=model), tmp_path / "run")
    diagnostics = hg.attribute(run, problem.queries, check=True, progress=False).diagnostics
    assert diagnostics.derivative_error is None
    assert not any("derivatives" in reason for reason in diagnostics.reasons)


class Detaching(nn.Module):
    """From a forward pass in training on, or until it, half of what it multiplies is taken for a constant."""

    def __init__(self, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.register_buffer("passes", torch.tensor(0))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.passes += 1
        z = torch.tanh(x)
        return z * (z.detach() if self.first <= int(self.passes) <= self.last else z)


LATER = {"always": (0, 99), "second half": (4, 99), "last step": (7, 99), "first half": (0, 3), "never": (99, 99)}


@pytest.mark.parametrize("when", LATER)
def test_a_constant_that_appears_later_is_found(when, tmp_path):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 6), Detaching(*LATER[when]), nn.Linear(6, 3)).double()
    run = recorded(replace(recipe_of(PROBLEM), model=model), tmp_path / "run")
    for check in (False, True):  # the second from what is known
        found = hg.attribute(run, PROBLEM.queries, check=check, progress=False).diagnostics
        assert found.derivative_error is not None
        assert (found.derivative_error > DERIVATIVES) == (when != "never")
        assert (found.verdict in ("doubtful", "meaningless")) == (when != "never")


def test_a_kink_nearby_is_not_a_wrong_derivative(tmp_path):
    """A kink within the first step of the differences, not within the second."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    sweep = Sweep.of(recorded(replace(recipe_of(PROBLEM), model=model), tmp_path / "run"))
    moment = next(forwards(sweep.replayer, sweep.run.trajectory, 1))
    point = next(points_of(moment, sweep.objective))[2]
    weight, bias, *others = point.params
    near = bias.clone()
    near[0] = 3e-7 - float(point.batch[0][0] @ weight[0])
    error = derivative_error(sweep.objective, replace(point, params=(weight, near, *others)), "exact")
    assert error is not None
    assert error < 1e-5
