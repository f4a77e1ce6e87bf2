"""A step taken twice: what is not repeatable is named, with its module; what is, is told from it."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hydragrad as hg
from hydragrad.trajectory.repeating import Nondeterminism, repeated
from hydragrad.trajectory.replay import Replayer
from tests.hypergradient.recorded import recipe_of, recorded
from tests.zoo import case

TINY = 1e-9
PROBLEM = case("mlp_tanh")


def noise() -> float:
    """A number that no seed rules, as the order of atomic additions is ruled by none."""
    return TINY * (1 + int.from_bytes(os.urandom(4), "little") / 2**32)


class Unsteady(nn.Module):
    """The identity up to noise, in its output or in the gradient that passes it."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "forward":
            return x * (1 + noise())
        if self.where == "backward" and x.requires_grad:
            x = x * 1
            x.register_hook(lambda g: g * (1 + noise()))
        return x


def run_with(middle: nn.Module, path: Path) -> hg.Run:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        inner = nn.Sequential(nn.Linear(6, 6), middle)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), inner, nn.Linear(6, 3)).double()
    recipe = recipe_of(PROBLEM)
    groups = [([name for name, _ in model.named_parameters()], {"lr": 0.1})]
    return recorded(type(recipe)(model, PROBLEM.loss, PROBLEM.samples, recipe.steps, "SGD", groups), path)


def found_by_hand(run: hg.Run, step: int = 0) -> Nondeterminism | None:
    return repeated(run.replayer(check=False), run.trajectory.state(0), run.steps[step])


NAMES = {"forward": ("2.1", "Unsteady"), "backward": ("2.0", "Linear")}  # the gradient reaches parameters before it


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_the_module_is_named(where, tmp_path):
    found = found_by_hand(run_with(Unsteady(where), tmp_path / "run"))
    assert found is not None
    assert (found.step, found.module, found.kind, found.where) == (0, *NAMES[where], where)
    assert TINY / 1e6 < found.difference < 10 * TINY
    assert f"module {found.module!r} ({found.kind})" in str(found)
    assert "use_deterministic_algorithms" in str(found)


def test_a_steady_run_repeats(tmp_path):
    assert found_by_hand(run_with(nn.Dropout(0.3), tmp_path / "run")) is None  # its random numbers are recorded


def test_an_update_that_differs_is_no_module(tmp_path, monkeypatch):
    run = run_with(nn.Identity(), tmp_path / "run")
    advance = Replayer.advance

    def nudged(self: Replayer, *args: Any, **more: Any) -> None:
        advance(self, *args, **more)
        with torch.no_grad():
            next(self.module.parameters()).mul_(1 + noise())

    monkeypatch.setattr(Replayer, "advance", nudged)
    found = found_by_hand(run)
    assert found is not None
    assert (found.where, found.module) == ("update", "")
    assert "after the optimizer's update" in str(found)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_verify_names_it(where, tmp_path):
    found = hg.verify(run_with(Unsteady(where), tmp_path / "run"))
    assert found.ok
    assert not found.exact
    assert found.nondeterminism is not None
    assert (found.nondeterminism.module, found.nondeterminism.where) == (NAMES[where][0], where)
    assert str(found.nondeterminism) in str(found)


def test_verify_tells_other_code_from_chance(tmp_path):
    run = run_with(nn.Identity(), tmp_path / "run")
    other = hg.load(
        tmp_path / "run",
        model=run.problem.model,
        loss=lambda model, batch: PROBLEM.loss(model, batch) * (1 + 1e-9),
        data=PROBLEM.samples,
    )
    found = hg.verify(other)
    assert not found.exact
    assert found.nondeterminism is None
    assert "step 0 can be repeated bit for bit" in str(found)
    exact = hg.verify(run)
    assert exact.exact
    assert "repeated" not in str(exact)


def test_an_attribution_names_it_and_doubts(tmp_path):
    run = run_with(Unsteady("forward"), tmp_path / "run")
    diagnostics = hg.attribute(run, PROBLEM.queries, progress=False, compile=False).diagnostics
    assert "module '2.1' (Unsteady)" in diagnostics.nondeterminism
    steps = [step for step, _ in diagnostics.drift_by_checkpoint]
    assert steps == [t for t in run.trajectory.checkpoints if t > 0]
    assert diagnostics.drift == max(drift for _, drift in diagnostics.drift_by_checkpoint) > 0
    assert f"drift by checkpoint: step {steps[0]} " in str(diagnostics)
    if diagnostics.drift > 1e-10:
        assert diagnostics.verdict != "reliable"
        assert any("module '2.1' (Unsteady)" in reason for reason in diagnostics.reasons)
