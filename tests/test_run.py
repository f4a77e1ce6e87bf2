"""Loading binds a run to live objects and names whatever is not as it was recorded."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Subset, TensorDataset, default_collate

from hydragrad.errors import MismatchError, UnsupportedError
from hydragrad.problem import Reduction
from hydragrad.trajectory.binding import check_model
from hydragrad.trajectory.explaining import explain_gradient
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.store import Trajectory
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


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recorded run of mean losses in batches of 5."""
    folder = tmp_path_factory.mktemp("recorded") / "run"
    record_run(folder)
    return folder


def test_a_run_is_bound_and_described(recorded: Path) -> None:
    run = bind(recorded)
    assert (run.num_steps, run.num_examples, len(run.steps)) == (10, N, 10)
    assert run.problem.reduction.name == "mean"
    assert "10 steps, 22 examples" in repr(run)
    assert [state.step for state in run.states(3, 6)] == [3, 4, 5]


def wide(hidden: int = 5, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """The ordinary model, built differently."""
    return nn.Sequential(nn.Linear(FEATURES, hidden), nn.Tanh(), nn.Linear(hidden, CLASSES)).to(dtype)


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (wide(hidden=6), r"shape of parameter '0.weight'.*\[5, 6\].*\[6, 6\]"),
        (wide(dtype=torch.float64), r"dtype of parameter '0.weight'.*float32.*float64"),
        (nn.Sequential(wide()), r"parameters are not the recorded ones.*missing: \['0.bias'.*unknown: \['0.0.bias'"),
        (nn.Sequential(*wide(), nn.BatchNorm1d(3, affine=False)), r"buffers are not the recorded ones.*running_mean"),
    ],
)
def test_another_model_is_refused(model: nn.Module, words: str, recorded: Path) -> None:
    with pytest.raises(MismatchError, match=words):
        bind(recorded, model=model)


def test_a_function_in_place_of_the_model_is_refused(recorded: Path) -> None:
    model: Any = wide
    with pytest.raises(UnsupportedError, match=r"no torch\.nn\.Module.*Got: wide.*Remedy: .*model=build\(\)"):
        check_model(model, Trajectory(recorded).manifest)


class Noisy(Dataset):
    """Other content each time it is asked."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> Any:
        points, label = make_data()[index]
        return points + torch.rand(()) * 1e-3, label


def changed(column: int, dtype: torch.dtype | None = None) -> TensorDataset:
    """The ordinary data with one column changed, or cast."""
    tensors = [tensor.clone() for tensor in make_data().tensors]
    tensors[column] = tensors[column].to(dtype) if dtype else (tensors[column] + 1) % CLASSES
    return TensorDataset(*tensors)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (make_data(20), "another length.*22 examples.*20 examples"),
        (Subset(make_data(), list(range(N))[::-1]), r"order of the data differs: recorded example (\d+) looks like"),
        (changed(1), "content of the data changed: 5 of the 5 examples at step 0.*labels"),
        (changed(0, torch.float64), r"another form.*\[0\]: float32 of shape \[6\].*\[0\]: float64 of shape \[6\]"),
        (changed(1, torch.int32), r"another form.*\[1\]: int64.*\[1\]: int32"),
        (Noisy(), "other content each time.*random augmentation"),
        (7, "data has no length"),
    ],
)
def test_other_data_is_refused(data: Any, words: str, recorded: Path) -> None:
    with pytest.raises(MismatchError, match=words):
        bind(recorded, data=data)


def test_the_moved_example_is_named_rightly(recorded: Path) -> None:
    with pytest.raises(MismatchError) as refusal:
        bind(recorded, data=Subset(make_data(), list(range(N))[::-1]))
    words = str(refusal.value).split()
    old, new = int(words[words.index("example") + 1]), int(words[words.index("like") + 2])
    assert old + new == N - 1


def test_one_flipped_label_of_the_first_batch_is_seen(recorded: Path) -> None:
    victim = int(bind(recorded).steps[0].batches[0][3])
    points, labels = (tensor.clone() for tensor in make_data().tensors)
    labels[victim] = (labels[victim] + 1) % CLASSES
    with pytest.raises(MismatchError, match=f"1 of the 5 examples at step 0.*the first is example {victim}"):
        bind(recorded, data=TensorDataset(points, labels))
    points[victim, 1] *= -1  # the top bits of two words
    points[victim, 3] *= -1
    with pytest.raises(MismatchError, match=f"1 of the 5 examples at step 0.*the first is example {victim}"):
        bind(recorded, data=TensorDataset(points, make_data().tensors[1]))


def scaled(factor: float) -> Any:
    """The ordinary loss times a factor."""
    return lambda model, batch: factor * losses(model, batch)


def squared(model: nn.Module, batch: Any) -> Tensor:
    """Another loss."""
    return (model(batch[0]) - F.one_hot(batch[1], CLASSES)).square().mean(1)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reduction": "sum"}, r"step 0 is 5 times larger.*batch size.*reduction='mean'"),
        ({"loss": scaled(0.25)}, r"step 0 is 4 times smaller"),
        ({"loss": scaled(4.0)}, r"step 0 is 4 times larger.*did the loop divide the loss by accumulation steps\?"),
        ({"loss": scaled(1.004)}, r"step 0 is 1.004 times larger.*a weighted or masked mean"),
        ({"loss": scaled(1.7)}, r"step 0 is 1.7 times larger.*loss scaling, or gradient clipping"),
        ({"loss": squared}, r"differs from the recorded one, not only in scale.*another loss"),
        ({"loss": lambda m, b: losses(m, b).mean()}, r"not per example.*\[5\].*reduction='none'"),
        ({"reduction": "median"}, "unknown reduction.*'mean', 'sum'"),
        ({"reduction": lambda batch, shape: torch.ones(3)}, r"coefficients do not fit.*\(5,\).*\(3,\)"),
    ],
)
def test_another_loss_or_reduction_is_refused(changes: dict[str, Any], words: str, recorded: Path) -> None:
    with pytest.raises((MismatchError, UnsupportedError), match=words):
        bind(recorded, **changes)


def test_gradients_that_are_nearly_equal_are_no_multiples(recorded: Path) -> None:
    """A small penalty left out: norms 0.07 % apart, projections by other factors."""
    step = replace(bind(recorded).steps[0], fingerprint=torch.tensor([0.693924, -1.10306, 0.393706]))
    told = explain_gradient(step, torch.tensor([0.694379, -1.10429, 0.397701]), 0)
    assert "differs from the recorded one, not only in scale" in told
    assert "a penalty in the loop's loss" in told


@pytest.mark.parametrize("forgets", [lambda t: True, lambda t: t % 5, lambda t: t == 4], ids=["all", "most", "one"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_a_forgotten_zero_grad_is_asked_about(forgets: Any, clip: float | None, tmp_path: Path) -> None:
    model, loader = make_model(), DataLoader(make_data(), 4)
    optimizer, t = sgd(model), 0
    with record(tmp_path / "run", model, optimizer, checkpoint_every=3) as recording:
        for _ in range(2):
            for batch in recording.batches(loader):
                if not forgets(t):
                    optimizer.zero_grad()
                losses(model, batch).mean().backward()
                if clip is not None:
                    recording.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                t += 1
    first = next(t for t in range(1, 10) if forgets(t))
    words = rf"at step {first} is the replayed one with that of step {first - 1} added.*did the loop forget zero_grad\?"
    with pytest.raises(MismatchError, match=words):
        bind(tmp_path / "run").replay()


def test_a_penalty_that_was_not_given_is_asked_for(tmp_path: Path) -> None:
    model = make_model()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        for batch in recording.batches(DataLoader(make_data(), 4)):
            optimizer.zero_grad()
            penalty = sum(param.abs().sum() for param in model.parameters())
            (losses(model, batch).mean() + 3e-3 * penalty).backward()
            optimizer.step()
    with pytest.raises(MismatchError, match=r"step 0 differs.*not only in scale.*a penalty in the loop's loss"):
        bind(tmp_path / "run")
    given = bind(tmp_path / "run", penalty=lambda m: 3e-3 * sum(p.abs().sum() for p in m.parameters()))
    assert_same_params(given.replay().params, params_of(model))


def test_rounding_of_the_loss_is_no_difference(recorded: Path) -> None:
    run = bind(recorded, loss=scaled(1 + 1e-6))
    run.replay()


def test_sums_recorded_as_sums(tmp_path: Path) -> None:
    model, data = make_model(), make_data()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer, reduction="sum") as recording:
        for batch in recording.batches(DataLoader(data, 4)):
            optimizer.zero_grad()
            losses(model, batch).sum().backward()
            optimizer.step()
    assert bind(tmp_path / "run").problem.reduction.name == "sum"
    ones = bind(tmp_path / "run", reduction=lambda batch, shape: torch.ones(()))
    assert_same_params(ones.replay().params, params_of(model))
    with pytest.raises(MismatchError, match=r"contradicts the recorded one.*'sum'.*'mean'"):
        bind(tmp_path / "run", reduction="mean")


def test_a_collate_function_of_ones_own_is_asked_for(tmp_path: Path) -> None:
    def collate(samples: list[Any]) -> Any:
        return default_collate(samples[::-1])

    model = make_model()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        for batch in recording.batches(DataLoader(make_data(), 4, collate_fn=collate)):
            losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    with pytest.raises(MismatchError, match=r"collate function of its own.*collate"):
        bind(tmp_path / "run")
    with pytest.raises(MismatchError, match=r"at step 0"):
        bind(tmp_path / "run", collate_fn=default_collate)
    bind(tmp_path / "run", collate_fn=collate).replay()


def test_reduction_in_numbers() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 6.0]], requires_grad=True)
    weights = torch.tensor([1.0, 0.5])
    assert Reduction().scalar(None, values, weights).item() == (1 + 2 + 1.5 + 3) / 4
    assert Reduction("sum").scalar(None, values, None).item() == 12
    own = Reduction(lambda batch, shape: torch.tensor([1.0, 10.0]))  # over L
    assert own.scalar(None, values, weights).item() == 1 + 20 + 1.5 + 30
    for reduction in (Reduction(), Reduction("sum"), own):
        (gradient,) = torch.autograd.grad(reduction.scalar(None, values, None), values)
        assert torch.equal(gradient, reduction.coefficients(None, values))
