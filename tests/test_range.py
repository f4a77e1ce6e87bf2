"""The range over which first-order scores hold, where it is known: linear, quadratic and chaotic responses."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hydragrad as hg
from hydragrad.checks import FEW, REMAINDER, SMALLER, estimated_range
from hydragrad.diagnostics import Diagnostics, Range, Rung
from tests.hypergradient.recorded import recipe_of, recorded
from tests.zoo import case

N, LR = 6, 0.1
DATA = [torch.tensor([0.3 + 0.1 * i, -0.2 * i], dtype=torch.float64) for i in range(N)]


def projection(model: nn.Module, batch: Tensor) -> Tensor:
    """A linear loss: its gradient does not depend on w, so that w_T is linear in the weights of the examples."""
    return model(batch).flatten()


def linear_run(path: Path) -> hg.Run:
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[0.5, 0.25]]))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    data: Any = DATA
    with hg.record(path, model, optimizer) as recording:
        for batch in recording.batches(DataLoader(data, batch_size=3)):
            optimizer.zero_grad()
            projection(model, batch).mean().backward()
            optimizer.step()
    return hg.load(path, model=model, loss=projection, data=data)


def range_of(run: hg.Run, queries: Any, measurement: Callable[..., Tensor] | None = None) -> Range:
    found = hg.attribute(run, queries, measurement=measurement, compile=False, progress=False).diagnostics.range
    assert found is not None
    return found


def test_a_linear_response_holds_over_the_whole_range(tmp_path):
    found = range_of(linear_run(tmp_path / "run"), DATA[:2])
    assert found == Range(1.0, 1.0, math.inf, FEW, REMAINDER)
    assert found.removals == FEW
    assert "for removing at least 5 examples at once" in str(found)


def bent(curvature: float) -> Callable[[nn.Module, Tensor], Tensor]:
    def measurement(model: nn.Module, batch: Tensor) -> Tensor:
        out = model(batch).flatten() - 0.565
        return out + curvature * out.square()

    return measurement


@pytest.mark.parametrize("curvature", [3.0, 20.0, 60.0, 200.0])
def test_a_quadratic_response_holds_up_to_the_known_step(curvature, tmp_path):
    """x = query . w_T moves by -h d, m = x + c x^2: S = (1 + 2 c x) d to first order, c (h d)^2 beyond, either side."""
    run = linear_run(tmp_path / "run")
    query = torch.tensor([1.0, 0.5], dtype=torch.float64)
    scores = hg.attribute(run, [query], measurement=bent(curvature), compile=False, progress=False)
    touched = list(scores.diagnostics.examples)
    w = torch.tensor([0.5, 0.25], dtype=torch.float64) - LR * torch.stack(DATA).sum(0) / 3
    d, x = float(LR / 3 * torch.stack([DATA[i] for i in touched]).sum(0) @ query), float(query @ w) - 0.565
    known = REMAINDER * abs(1 + 2 * curvature * x) / (curvature * abs(d))
    found = scores.diagnostics.range
    assert found is not None
    assert known > SMALLER
    if known > 1:
        assert (found.step, found.high) == (1.0, math.inf)
        return
    assert found.step == pytest.approx(known, rel=1e-6)  # one power rules: the line is straight
    assert found.low < found.step < found.high == (1.0 if known > 0.1 else 0.1)
    assert found.removals == pytest.approx(known * FEW, rel=1e-6)
    assert "about" in str(found)


def test_all_three_places_of_the_range_were_seen(tmp_path):
    """The curvatures above fall between different rungs."""
    run = linear_run(tmp_path / "run")
    query = [torch.tensor([1.0, 0.5], dtype=torch.float64)]
    assert {range_of(run, query, bent(c)).high for c in (3.0, 20.0, 200.0)} == {math.inf, 1.0, 0.1}


def test_a_chaotic_run_has_none(tmp_path):
    epochs = [[[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]] * 12
    problem = case("mlp_tanh")
    recipe = recipe_of(problem, hyper={"lr": 30.0}, steps=[step for epoch in epochs for step in epoch])
    diagnostics = hg.attribute(recorded(recipe, tmp_path / "run", epochs), problem.queries, progress=False).diagnostics
    assert diagnostics.range is not None
    assert (diagnostics.range.step, diagnostics.range.low, diagnostics.range.high) == (0.0, 0.0, SMALLER)
    assert [rung.step for rung in diagnostics.ladder] == [SMALLER, 0.1, 1.0]
    assert "do not even hold for weights of 5 examples changed by 0.01" in str(diagnostics)
    assert diagnostics.verdict == "meaningless"
    assert diagnostics.summary.startswith("first-order scores are meaningless here, because really removing 5 examples")
    assert Diagnostics.from_dict(diagnostics.to_dict()) == diagnostics


def rungs(*remainders: float) -> tuple[Rung, ...]:
    steps = (0.01, 0.1, 1.0)[-len(remainders) :]
    return tuple(Rung(h, r, 1.0, r) for h, r in zip(steps, remainders, strict=True))


def test_ranges_by_hand():
    assert estimated_range(rungs(0.01, 0.1), 5) == Range(1.0, 1.0, math.inf, 5, REMAINDER)
    assert estimated_range(rungs(0.4, 0.5, 0.6), 5) == Range(0.0, 0.0, 0.01, 5, REMAINDER)
    # a tenth of the limit at 0.1, ten times it at 1: in the middle, in logarithms
    assert estimated_range(rungs(REMAINDER / 10, REMAINDER * 10), 5).step == pytest.approx(0.1 * 10**0.5)
    assert estimated_range(rungs(0.1, 2.0, 0.1), 5).high == 0.1  # what holds again further up does not count
    assert estimated_range(rungs(0.1, math.nan), 5) == Range(0.1, 0.1, 1.0, 5, REMAINDER)  # diverged when retrained
    assert estimated_range(rungs(0.1, math.inf), 5) == Range(0.1, 0.1, 1.0, 5, REMAINDER)
    assert estimated_range(rungs(math.nan, math.nan, math.nan), 5).high == 0.01


def test_ranges_in_words():
    told = str(Range(0.52, 0.1, 1.0, 5, 0.35))
    assert told == (
        "first-order scores hold for removing about 2.6 examples at once "
        "(weights of 5 examples changed by up to 0.52: off by at most 35%)"
    )
    assert "about 1 example at once" in str(Range(0.2, 0.1, 1.0, 5, 0.35))
