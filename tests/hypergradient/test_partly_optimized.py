"""An optimizer over some of the model's layers: gradients of the others, which pile up unzeroed, count for nothing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import hydragrad as hg
from tests.hypergradient.recorded import EPOCHS, STEPS, Passes, values
from tests.oracles import Clip, Recipe, recursion, unroll
from tests.tolerances import ORACLE, assert_close
from tests.zoo import case

PROBLEM = case("mlp_tanh")
LAYERS = {"head": ["2.weight", "2.bias"], "body": ["0.weight", "0.bias"]}
RATES: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
EXAMPLES = [3, 11, 0, 6]


def nothing(recording: hg.Recording, model: nn.Module) -> None: ...


def trained(path: Path, held: list[str], between: Callable[[hg.Recording, nn.Module], Any] = nothing) -> nn.Module:
    """Every parameter requires a gradient; the optimizer holds some, and zeroes theirs alone."""
    model = PROBLEM.build()
    optimizer = torch.optim.SGD([model.get_parameter(name) for name in held], **RATES)
    loader = DataLoader(PROBLEM.samples, batch_sampler=Passes(EPOCHS))  # type: ignore[arg-type]
    with hg.record(path, model, optimizer) as recording:
        for _ in EPOCHS:
            for batch in recording.batches(loader):
                optimizer.zero_grad()
                PROBLEM.loss(model, batch).mean().backward()
                between(recording, model)
                optimizer.step()
    return model


def loaded(path: Path) -> hg.Run:
    return hg.load(path, model=PROBLEM.build(), loss=PROBLEM.loss, data=PROBLEM.samples)


def described(held: list[str], **more: Any) -> Recipe:
    """For the oracles: the other layers do not train at all."""
    model = copy.deepcopy(PROBLEM.build())
    for name, param in model.named_parameters():
        param.requires_grad_(name in held)
    return Recipe(model, PROBLEM.loss, PROBLEM.samples, STEPS, "SGD", [(held, RATES)], **more)


@pytest.mark.parametrize("clipped", [False, True], ids=["plain", "clipped by value"])
@pytest.mark.parametrize("held", LAYERS.values(), ids=LAYERS)
def test_what_piles_up_beside_the_optimizer_changes_nothing(held: list[str], clipped: bool, tmp_path: Path) -> None:
    def clip(recording: hg.Recording, model: nn.Module) -> None:
        recording.clip_grad_value_(model.parameters(), 0.02)

    model = trained(tmp_path / "run", held, clip if clipped else nothing)
    run, recipe = loaded(tmp_path / "run"), described(held, clip=[Clip(0.02, None)] if clipped else None)
    assert hg.verify(run).exact
    end = run.replay().params
    assert all(torch.equal(end[name], param) for name, param in model.named_parameters())
    assert_close(values(run, PROBLEM.queries), unroll(recipe).scores(PROBLEM.queries), ORACLE)
    for method in ("exact", "gauss-newton", "hessian-free"):
        dense = recursion(recipe, method)
        assert_close(values(run, PROBLEM.queries, method), dense.scores(PROBLEM.queries), ORACLE)
        found = hg.hypergradients(run, examples=EXAMPLES, method=method, check=False)
        assert_close(found.vectors, dense.vectors[EXAMPLES], ORACLE)


def test_a_clip_whose_norm_counts_what_piled_up_is_named(tmp_path: Path) -> None:
    trained(tmp_path / "run", LAYERS["head"], lambda recording, model: recording.clip_grad_norm_(model.parameters(), 1))
    run = loaded(tmp_path / "run")
    found = hg.verify(run)
    assert not found.ok
    words = " ".join(found.reasons)
    assert "the clip's norm counted the gradient of '0.weight', which the optimizer does not hold" in words
    assert "give clip_grad_norm_ the optimizer's parameters" in words
    with pytest.raises(hg.UnsupportedError, match=r"step 0 clipped the gradient of '0\.weight'"):
        values(run, PROBLEM.queries)


def test_a_skipped_batch_is_told_by_a_gradient_that_the_optimizer_zeroes(tmp_path: Path) -> None:
    """The model's last parameter is beside the optimizer: its gradient is never thrown away."""
    model = PROBLEM.build()
    optimizer = torch.optim.SGD([model.get_parameter(name) for name in LAYERS["body"]], **RATES)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(PROBLEM.samples, 3))):  # type: ignore[arg-type]
            optimizer.zero_grad()
            PROBLEM.loss(model, batch).mean().backward()
            if place != 1:
                optimizer.step()
    run = loaded(tmp_path / "run")
    assert [[ids.tolist() for ids in step.skipped] for step in run.steps] == [[], [[3, 4, 5]], []]
    assert hg.verify(run).exact


def test_a_frozen_layer_whose_old_gradient_is_applied_again_and_again_is_refused(tmp_path: Path) -> None:
    """Its gradient depends on the step that it was left from: neither zeros nor this step's."""
    model = PROBLEM.build()
    optimizer = torch.optim.SGD(model.parameters(), **RATES)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(PROBLEM.samples, 3))):  # type: ignore[arg-type]
            if place == 2:
                model.get_submodule("0").requires_grad_(False)
            for param in model.parameters():
                param.grad = None if param.requires_grad else param.grad
            PROBLEM.loss(model, batch).mean().backward()
            optimizer.step()
    run = loaded(tmp_path / "run")
    with pytest.raises(hg.MismatchError, match=r"step 2 .*'0.bias', which is frozen, was kept from an earlier step"):
        values(run, PROBLEM.queries)
