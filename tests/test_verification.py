"""Verification says how far a replay is from the record, and why."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import hydragrad as hg
from hydragrad.errors import MismatchError
from hydragrad.verification import verify
from tests.trajectory.loops import CLASSES, FEATURES, bind, losses, make_data, make_model, record_run


def test_an_exact_replay_is_called_exact(tmp_path: Path) -> None:
    record_run(tmp_path / "run")
    found = verify(bind(tmp_path / "run"))
    assert found
    assert found.exact
    assert found.first_difference is None
    assert found.drift == {0: 0.0, 4: 0.0, 8: 0.0, 10: 0.0}
    assert str(found) == "exact: 10 steps replayed bit for bit"


def nudged(model: nn.Module, batch: Any) -> Tensor:
    """The same loss up to rounding."""
    return losses(model, batch) * (1 + 2**-20)


def test_rounding_is_ok_but_not_exact_and_measured(tmp_path: Path) -> None:
    record_run(tmp_path / "run")
    found = verify(bind(tmp_path / "run", loss=nudged))
    assert found.ok
    assert not found.exact
    assert found.first_difference == 0
    assert found.drift[0] == 0.0
    assert 1e-8 < found.drift[10] < 1e-4
    assert "to rounding" in str(found)
    assert "gradients differ from step 0" in str(found)


def test_data_that_changed_later_in_the_run_fails_with_its_step_and_cause(tmp_path: Path) -> None:
    record_run(tmp_path / "run", epochs=1)
    run = bind(tmp_path / "run")
    victim = int(run.steps[3].batches[0][2])
    points, labels = (tensor.clone() for tensor in make_data().tensors)
    points[victim, 1] += 0.5
    found = verify(bind(tmp_path / "run", data=TensorDataset(points, labels)))
    assert not found
    assert not found.exact
    assert found.steps == 3
    assert found.first_difference == 3
    assert f"the first is example {victim}" in str(found)
    assert str(found).startswith("failed")


@pytest.mark.parametrize(("after", "first", "checkpoint"), [(9, 9, 10), (10, None, 10)])
def test_parameters_changed_outside_the_steps_are_found(
    after: int, first: int | None, checkpoint: int, tmp_path: Path
) -> None:
    model = make_model()
    taken: list[int] = []

    @torch.no_grad()
    def meddle() -> None:
        taken.append(1)
        if len(taken) == after:
            next(model.parameters()).mul_(1.0001 if first is None else 0.0)

    record_run(tmp_path / "run", model, on_step=meddle)
    found = verify(bind(tmp_path / "run"))
    assert not found.exact
    assert found.first_difference == first
    assert found.drift[8] == 0.0
    assert found.ok == (first is None)  # the first change is large, the second within rounding's allowance
    assert first is not None or found.drift[checkpoint] > 1e-5


def normalized() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(FEATURES, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, CLASSES))


def validated_while_training(model: nn.Module, on: bool) -> Callable[[], None]:
    """After every third step the model looks at other points, in training mode unless ``on`` is False."""
    taken: list[int] = []

    def look() -> None:
        taken.append(1)
        if len(taken) % 3 == 0:
            model.train(on)
            with torch.no_grad():
                losses(model, make_data(9).tensors)
            model.train()

    return look


def halved_at_the_end(model: nn.Module) -> Callable[[], None]:
    taken: list[int] = []

    @torch.no_grad()
    def halve() -> None:
        taken.append(1)
        if len(taken) == 10:
            next(model.parameters()).mul_(0.5)

    return halve


@pytest.mark.parametrize("step", [None, 10])
@pytest.mark.parametrize("what", ["buffer", "parameter"])
def test_a_state_changed_beside_the_steps_is_named_and_refused(what: str, step: int | None, tmp_path: Path) -> None:
    """No gradient tells: training does not read running statistics, and nothing follows the last step."""
    model = normalized()
    meddle = validated_while_training(model, True) if what == "buffer" else halved_at_the_end(model)
    record_run(tmp_path / "run", model, on_step=meddle)
    run = bind(tmp_path / "run", model=normalized())
    found = verify(run)
    assert not found
    assert found.first_difference is None
    at, since, name = (4, 0, "1.") if what == "buffer" else (10, 8, "0.weight")
    told = f"the state at step {at} is not what the recorded steps make of the state at step {since}: {what} '{name}"
    assert told in str(found)
    assert "rounding" not in str(found)
    with pytest.raises(MismatchError, match="is not what the recorded steps make of") as refused:
        hg.attribute(run, make_data(3), step=step, progress=False, check=False)
    assert f"{what} '{name}" in str(refused.value)


def test_a_momentum_that_the_loop_edits_is_among_the_causes(tmp_path: Path) -> None:
    """No gradient tells: training does not read running statistics."""
    model = normalized()
    norm: Any = model.get_submodule("1")

    def edit() -> None:
        norm.momentum *= 0.5

    record_run(tmp_path / "run", model, on_step=edit)
    found = verify(bind(tmp_path / "run", model=normalized()))
    assert not found
    assert "an attribute of a layer that the loop changed" in str(found)
    assert "BatchNorm's momentum" in str(found)


def test_validation_in_evaluation_mode_changes_nothing(tmp_path: Path) -> None:
    model = normalized()
    record_run(tmp_path / "run", model, on_step=validated_while_training(model, False))
    assert verify(bind(tmp_path / "run", model=normalized())).exact


def test_a_gradient_that_differs_later_may_have_been_meddled_with(tmp_path: Path) -> None:
    model = make_model()

    @torch.no_grad()
    def clamp() -> None:
        for param in model.parameters():
            param.clamp_(-0.1, 0.1)

    record_run(tmp_path / "run", model, on_step=clamp)
    found = verify(bind(tmp_path / "run"))
    assert found.first_difference == 1
    assert "something else than the recorded optimizer changed parameters" in str(found)
    assert "or the loop changed an attribute of the model" in str(found)


def test_best_weights_loaded_after_the_block_are_a_recorded_step(tmp_path: Path) -> None:
    """Early stopping as the page on recording advises, with a copy of the model taken inside the block."""
    model, kept = normalized(), list[nn.Module]()

    def keep() -> None:
        kept.append(copy.deepcopy(model))

    record_run(tmp_path / "run", model, on_step=keep)
    model.load_state_dict(kept[6].state_dict())
    run = bind(tmp_path / "run", model=normalized())
    assert verify(run).exact
    state = run.replay(until=7)
    assert all(
        torch.equal(value, {**state.params, **state.buffers}[name]) for name, value in model.state_dict().items()
    )
    assert hg.attribute(run, make_data(3), step=7, progress=False, check=False).diagnostics.drift == 0.0


def test_an_incomplete_recording_is_verified_as_far_as_it_goes(tmp_path: Path) -> None:
    record_run(tmp_path / "run")
    journal = tmp_path / "run" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-20])
    found = verify(bind(tmp_path / "run"))
    assert found.exact
    assert "incomplete (the recording process was killed, or its disk was full: it could not say how it ended)" in str(
        found
    )
    assert "10 steps were kept" in str(found)


def test_a_run_that_diverged_to_nan_is_not_called_different(tmp_path: Path) -> None:
    model = make_model()
    record_run(tmp_path / "run", model, torch.optim.SGD(model.parameters(), lr=float("inf")))
    assert not all(bool(param.isfinite().all()) for param in model.parameters())
    found = verify(bind(tmp_path / "run"))
    assert found.exact
    assert "the run itself is not finite: after step 0 the parameter '0.weight' is not finite" in str(found)
