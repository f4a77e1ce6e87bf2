"""Skipped batches that moved running statistics: both sweeps pass through what their forward pass did to buffers."""

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hydragrad as hg
from tests.hypergradient.recorded import optimizer_of, recipe_of, values
from tests.hypergradient.test_buffers import METHODS, assert_sweeps_match
from tests.oracles import Recipe, finite_differences, unroll
from tests.tolerances import FINITE_DIFFERENCE, ORACLE, assert_close
from tests.zoo import N_TRAIN, case

SKIPPED = 3
"""Batches of this size are skipped, in every step of this run; no other has it."""
STEPS = [
    [[0, 1, 2, 3]],
    [[4, 5, 6], [7, 8, 9, 10]],
    [[1, 2, 4, 11], [0, 5, 9], [6, 7, 8, 2]],
    [[3, 8, 11], [2, 5, 6], [10, 9]],
    [[6, 2, 0, 1, 7]],
]


def coefficients(batch: Any, shape: torch.Size) -> Tensor:
    """To the oracle, a skipped batch is one whose losses count nothing."""
    return torch.full(shape, 0.0 if shape[0] == SKIPPED else 1 / shape[0], dtype=torch.float64)


def described(name: str, steps: Sequence[Sequence[Sequence[int]]] = STEPS, **more: Any) -> Recipe:
    return recipe_of(case(name), steps=steps, reduction=coefficients, **more)


class Once:
    """A batch sampler of these batches."""

    def __init__(self, recipe: Recipe) -> None:
        self.ids = [list(ids) for step in recipe.steps for ids in step]

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.ids

    def __len__(self) -> int:
        return len(self.ids)


def recorded(recipe: Recipe, folder: Path, *, frozen: str | None = None) -> hg.Run:
    """As a loop would: skipped batches are run forward, in training mode, and thrown away; `frozen`: a module there."""
    model = copy.deepcopy(recipe.model).train()
    optimizer = optimizer_of(recipe, model)
    ends = {sum(map(len, recipe.steps[: t + 1])) for t in range(len(recipe.steps))}
    with hg.record(folder, model, optimizer, checkpoint_every=2) as recording:
        loader = DataLoader(recipe.samples, batch_sampler=Once(recipe))  # type: ignore[arg-type]
        for place, batch in enumerate(recording.batches(loader), 1):
            skipped = len(batch[1]) == SKIPPED
            if frozen:
                model.get_submodule(frozen).train(not skipped)
            losses = recipe.loss(model, batch)
            if not skipped:
                losses.mean().backward()
            if place in ends:
                optimizer.step()
                optimizer.zero_grad()
    run = hg.load(folder, model=copy.deepcopy(recipe.model), loss=recipe.loss, data=recipe.samples)
    assert hg.verify(run).exact
    return run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["batchnorm", "conv_batchnorm"])
def test_both_sweeps_against_dense_matrices(name: str, method: str, tmp_path: Path) -> None:
    recipe = described(name)
    run = recorded(recipe, tmp_path / "run")
    assert [len(record.passes) for record in run.steps] == [0, 1, 1, 2, 0]
    assert_sweeps_match(case(name), recipe, run, method)


def test_the_unrolled_run_and_what_is_missed_without_them(tmp_path: Path) -> None:
    problem, recipe = case("batchnorm"), described("batchnorm")
    expected = unroll(recipe).scores(problem.queries)
    assert_close(values(recorded(recipe, tmp_path / "run"), problem.queries), expected, ORACLE)
    without = described("batchnorm", [[ids for ids in step if len(ids) != SKIPPED] for step in STEPS])
    other = unroll(without).scores(problem.queries)
    assert float((other - expected).abs().max()) > 1e-3 * float(expected.abs().max())  # they matter


def test_retraining(tmp_path: Path) -> None:
    """Central differences of replays, which run the very modules of torch."""
    problem, recipe = case("batchnorm"), described("batchnorm")
    run = recorded(recipe, tmp_path / "run")

    def measure(state: hg.State) -> Tensor:
        model: nn.Module = problem.build().eval()
        model.load_state_dict({**state.params, **state.buffers})
        inputs, labels = (torch.stack(x) for x in zip(*problem.queries, strict=True))
        return problem.loss(model, (inputs, labels)).detach()

    direction = torch.randn(N_TRAIN, dtype=torch.float64)
    scores = values(run, problem.queries, measurement=problem.loss)
    assert_close(finite_differences(run, measure, direction, 1e-5), direction @ scores, FINITE_DIFFERENCE)


def test_another_mode_than_that_of_the_step_is_refused(tmp_path: Path) -> None:
    problem = case("conv_batchnorm")
    inner = next(n for n, m in problem.build().named_modules() if n and not list(m.children()) and "Norm" not in str(m))
    run = recorded(described("conv_batchnorm"), tmp_path / "run", frozen=inner)
    with pytest.raises(hg.UnsupportedError, match=r"before step 1 a batch that was skipped changed the buffer.*modes"):
        values(run, problem.queries)
    assert values(run, problem.queries, step=1).isfinite().all()
