"""NaN and infinities are found, and the first step and tensor named."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import hydragrad as hg
from hydragrad import attributing, vectors
from hydragrad.hypergradient.finite import FirstBad
from hydragrad.hypergradient.reverse import Elementwise, Uniform
from hydragrad.verification import verify
from tests.hypergradient.recorded import EPOCHS, recipe_of, recorded
from tests.tolerances import SAME, assert_close
from tests.trajectory.loops import bind, make_data, make_model, record_run
from tests.zoo import N_TRAIN, case

PROBLEM = case("mlp_tanh")
QUERIES = PROBLEM.queries


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return recorded(recipe_of(PROBLEM), tmp_path_factory.mktemp("finite") / "run")


def poisoned(path: Path) -> tuple[hg.Run, int]:
    """Example 13 holds an infinity; the step it first comes in."""
    data = make_data()
    data.tensors[0][13, 2] = float("inf")
    record_run(path, data=data, checkpoint_every=3)
    run = bind(path, data=data)
    return run, next(step.index for step in run.steps if 13 in torch.cat(step.batches))


def test_replay_names_the_first_gradient_that_is_not_finite(tmp_path: Path) -> None:
    run, first = poisoned(tmp_path / "run")
    assert 0 < first < 5
    words = rf"at step {first} the gradient of parameter '0\.weight' is not finite.*Expected: .*'0\.weight'.*until="
    for until in (None, first + 1, first + 3):
        with pytest.raises(hg.NonFiniteError, match=words):
            run.replay(until=until)
    assert all(bool(x.isfinite().all()) for x in run.replay(until=first).params.values())
    found = verify(run)
    assert found.exact  # it is what was recorded
    assert f"at step {first} the gradient of parameter '0.weight' is not finite" in str(found)


def test_sweeps_of_a_run_that_is_not_finite_say_where_it_came_from(tmp_path: Path) -> None:
    run, first = poisoned(tmp_path / "run")
    words = rf"at step {first} the gradient of parameter '0\.weight' is not finite"
    queries = [make_data()[i] for i in range(3)]
    with pytest.raises(hg.NonFiniteError, match=words):
        hg.attribute(run, queries)
    with pytest.raises(hg.NonFiniteError, match=words):
        hg.hypergradients(run, [1], progress=False)
    assert hg.attribute(run, queries, step=first, check=False).values.isfinite().all()  # as the remedy says


@pytest.mark.parametrize("by_loop", [False, True])
def test_statistics_that_a_skipped_batch_made_nan_are_named(by_loop: bool, tmp_path: Path) -> None:
    """The loop goes on without the batch, but BatchNorm has seen it: in evaluation mode the model gives NaN."""
    problem = case("batchnorm", torch.float32)
    model, inputs = problem.build(), torch.stack([x for x, _ in problem.samples])
    data = TensorDataset(inputs.clone(), torch.stack([y for _, y in problem.samples]))
    data.tensors[0][5] = torch.nan if not by_loop else 0.0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for place, (x, y) in enumerate(recording.batches(DataLoader(data, 4))):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x * torch.nan if by_loop and place == 1 else x), y)
            if not loss.isfinite():
                continue
            loss.backward()
            optimizer.step()
    run = hg.load(tmp_path / "run", model=problem.build(), loss=problem.loss, data=data)
    assert run.num_steps == 2
    # where the loop itself spoilt the batch, a replay does not meet what the statistics met
    where = (
        r"the state at step 2: buffer '1\.running_mean'" if by_loop else r"after step 1 the buffer '1\.running_mean'"
    )
    with pytest.raises(hg.NonFiniteError, match=rf"^{where} is not finite.*BatchNorm saw in training mode"):
        hg.attribute(run, problem.queries)
    found = verify(run)
    if by_loop:
        assert not found
        assert "is not what the recorded steps make of" in str(found)
    else:
        assert found.exact
        assert "after step 1 the buffer '1.running_mean' is not finite" in str(found)


def test_weights_that_lead_to_infinity_are_told_from_the_run(tmp_path: Path) -> None:
    record_run(tmp_path / "run")
    run = bind(tmp_path / "run")
    first = next(step.index for step in run.steps if 7 in torch.cat(step.batches))
    weights = torch.ones(22, dtype=torch.float64)
    weights[7] = 1e300  # beyond float32
    with pytest.raises(hg.NonFiniteError, match=rf"at step {first} the gradient .* with these weights of the examples"):
        run.replay(weights=weights)
    assert run.replay().step == run.num_steps
    weights[7] = 3.0
    assert run.replay(weights=weights).step == run.num_steps


def test_a_parameter_that_its_update_makes_infinite_is_named(tmp_path: Path) -> None:
    model, taken = make_model(), list[int]()
    groups = [{"params": [*part.parameters()]} for part in (model[0], model[2])]
    optimizer = torch.optim.SGD(groups, lr=0.1)

    def on_step() -> None:
        taken.append(1)
        optimizer.param_groups[1]["lr"] = 0.1 if len(taken) < 3 else float("inf")

    record_run(tmp_path / "run", model, optimizer, on_step=on_step)
    run = bind(tmp_path / "run")
    with pytest.raises(hg.NonFiniteError, match=r"after step 3 the parameter '2\.weight' is not finite"):
        run.replay()
    assert all(bool(x.isfinite().all()) for x in run.replay(until=3).params.values())


class Masked(nn.Module):
    """Adds a mask of minus infinity to what would be a fourth class."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = make_model()
        self.mask = nn.Parameter(torch.tensor([0.0, 0.0, -float("inf")]), requires_grad=False)

    def forward(self, points: Tensor) -> Tensor:
        return torch.cat([self.inner(points), self.mask.expand(len(points), 3)], 1)


def test_infinities_that_were_there_and_do_not_train_are_none_of_it(tmp_path: Path) -> None:
    model = Masked()
    record_run(tmp_path / "run", model, torch.optim.SGD(model.inner.parameters(), lr=0.1))
    run = bind(tmp_path / "run", model=Masked())
    assert run.replay().params["mask"].isinf().sum() == 1
    scores = hg.attribute(run, [make_data()[i] for i in range(3)], check=False)
    assert scores.values.isfinite().all()


# ---------------------------------------------------------------------------------------------------------------
# Sweeps


@pytest.mark.parametrize("width", [2, 2**16])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_bad_tensor_is_named_whatever_follows(bad: float, width: int) -> None:
    seen = FirstBad(["a", "b", "c", "empty"])
    tensors = [torch.ones(2, 3), torch.full((2, width), 1e38), torch.ones(2, 1, dtype=torch.float64), torch.ones(2, 0)]
    assert seen.first() is None
    seen.see(9, tensors)
    assert seen.first() is None  # the largest numbers are numbers
    tensors[1][1, 0] = bad
    seen.see(8, tensors)
    for tensor in tensors:
        tensor.fill_(bad)
    seen.see(7, tensors)
    assert seen.first() == (8, ["b"])
    seen.see(6, tensors)
    assert seen.first() == (8, ["b"])


def test_numbers_are_looked_at_as_tensors_are_however_many_looks_there_were() -> None:
    seen = FirstBad(["a", "b"])
    for step in range(200, 100, -1):
        seen.see(step, [1.0, float("inf") if step <= 150 else 1e300])
    assert seen.first() == (150, ["b"])


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("method", ["exact", "gauss-newton", "hessian-free"])
def test_an_adjoint_that_is_not_finite_is_named_with_its_first_step(
    method: str, optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = recorded(recipe_of(PROBLEM, optimizer, {"lr": 0.01}), tmp_path / "run")
    real = attributing.Watch.__call__

    def watch(self: Any, step: int, adjoint: Any) -> None:
        self.every = 100  # it is found at the end, and was noticed at its step
        if step == 4:
            if isinstance(adjoint, Uniform):
                adjoint.lam[1] = float("nan")
            else:
                (adjoint.ones if isinstance(adjoint, Elementwise) else adjoint).lam[1].view(-1)[0] = float("nan")
        real(self, step, adjoint)

    monkeypatch.setattr(attributing.Watch, "__call__", watch)
    name = list(run.trajectory.manifest.params)[1]
    with pytest.raises(hg.NonFiniteError, match=rf"the adjoint is not finite at step 4, first in parameter '{name}'"):
        hg.attribute(run, QUERIES, method=method, check=False)


@pytest.mark.parametrize("step", [0, 3, 6])
def test_a_hypergradient_that_is_not_finite_is_named_with_its_first_step(
    step: int, run: hg.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, name = vectors.forward_sweep, list(run.trajectory.manifest.params)[2]

    def sweep(*args: Any) -> Any:
        tangents, block, watch = args[-3:]

        def poked(at: int) -> None:
            if at == step:
                tangents.h[2][0, 0] = float("inf")
            watch(at)

        return real(*args[:-3], tangents, block, poked)  # type: ignore[call-arg]

    monkeypatch.setattr(vectors, "forward_sweep", sweep)
    words = rf"a hypergradient is not finite after step {step}, first in '{name}'.*Likely cause: .*Remedy: "
    with pytest.raises(hg.NonFiniteError, match=words):
        hg.hypergradients(run, [3, 4], progress=False)
    assert not hg.hypergradients(run, [3, 4], check=False, progress=False).vectors.isfinite().all()


def test_scores_that_are_not_finite_name_example_and_query(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = attributing.Scores.add

    def add(self: Any, ids: Tensor, chosen: slice, terms: Tensor, epoch: int) -> None:
        if chosen.start <= 2 < chosen.stop:
            terms = torch.where((ids == 5) & (torch.arange(chosen.start, chosen.stop) == 2)[:, None], torch.nan, terms)
        real(self, ids, chosen, terms, epoch)

    monkeypatch.setattr(attributing.Scores, "add", add)
    with pytest.raises(hg.NonFiniteError, match=r"scores are not finite.*training example \(or group\) 5 and query 2"):
        hg.attribute(run, QUERIES, check=False)


def test_retraining_that_diverges_makes_the_verdict_not_the_end(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that took an hour are not thrown away because their check fails."""
    expected, real = hg.attribute(run, QUERIES, check=False).values, hg.Run.replay

    def replay(self: hg.Run, weights: Tensor | None = None, until: int | None = None) -> hg.State:
        if weights is not None and bool((weights == 2).any()):
            raise hg.NonFiniteError("after step 3 the parameter 'w' is not finite.")
        return real(self, weights, until)

    monkeypatch.setattr(hg.Run, "replay", replay)
    scores = hg.attribute(run, QUERIES)
    assert_close(scores.values, expected, SAME)
    assert scores.diagnostics.verdict == "meaningless"
    assert any("weighing 2 each, after step 3 the parameter 'w'" in reason for reason in scores.diagnostics.reasons)


def test_looking_costs_no_replay(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all is finite nothing is replayed twice."""
    from hydragrad.trajectory.replay import Replayer

    taken, real = [], Replayer.advance

    def advance(self: Any, *args: Any, **options: Any) -> None:
        taken.append(1)
        real(self, *args, **options)

    monkeypatch.setattr(Replayer, "advance", advance)
    run.replay()
    assert len(taken) == sum(len(epoch) for epoch in EPOCHS)
    run.replay(weights=torch.full((N_TRAIN,), 0.5))
    assert len(taken) == 2 * sum(len(epoch) for epoch in EPOCHS)
