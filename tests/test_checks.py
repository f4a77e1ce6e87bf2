"""Checks: by hand where that can be done, against hand-written retraining, and on models with wrong derivatives."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import hydragrad as hg
from hydragrad.checks import (
    DOUBTFUL,
    FEW,
    GROWTH,
    LADDER,
    RELIABLE,
    REMAINDER,
    SMALLER,
    Checks,
    FiniteDifferences,
    _correlation,
    _error,
    finite_differences,
    judge,
)
from hydragrad.derivatives import DERIVATIVES
from hydragrad.diagnostics import Rung
from hydragrad.hypergradient.queries import Columns, Queries
from tests.hypergradient.recorded import recipe_of, recorded
from tests.tolerances import SAME, assert_close
from tests.zoo import N_QUERY, N_TRAIN, case

# ---------------------------------------------------------------------------------------------------------------
# Errors and correlations, by hand


def doubles(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_errors_by_hand():
    assert _error(doubles(3, 4), doubles(3, 4)) == 0.0
    assert _error(doubles(3, 4), doubles(0, 0)) == 1.0
    assert _error(doubles(3, 4), doubles(6, 8)) == 1.0
    assert _error(doubles(3, 4), doubles(3, 3)) == pytest.approx(1 / 5)
    assert _error(doubles(0, 0), doubles(0, 0)) == 0.0
    assert _error(doubles(0, 0), doubles(0, 1e-9)) == 1.0  # a change was predicted and none came


def test_correlations_by_hand():
    assert _correlation(doubles(1, 2, 3), doubles(2, 4, 6)) == pytest.approx(1)
    assert _correlation(doubles(1, 2, 3), doubles(5, 4, 3)) == pytest.approx(-1)
    # deviations -1, 0, 1 and -1/3, 2/3, -1/3: their product is 0
    assert _correlation(doubles(1, 2, 3), doubles(0, 1, 0)) == pytest.approx(0, abs=1e-12)
    # deviations -1, 0, 1 and -1, 1, 0: 1 / sqrt(2 * 2)
    assert _correlation(doubles(1, 2, 3), doubles(0, 2, 1)) == pytest.approx(0.5)
    assert math.isnan(_correlation(doubles(1, 2), doubles(1, 2)))  # two points always lie on a line
    assert math.isnan(_correlation(doubles(1, 1, 1), doubles(1, 2, 3)))
    assert math.isnan(_correlation(doubles(1, 2, 3), doubles(1, 1, 1)))


# ---------------------------------------------------------------------------------------------------------------
# The verdict


IN_BETWEEN = (RELIABLE + DOUBTFUL) / 2  # doubtful


def found(top: float, low: float = 0.0) -> FiniteDifferences:
    return FiniteDifferences((Rung(0.1, low, 1.0), Rung(1.0, top, 0.5)), (3, 7), 0)


def verdict_of(
    found: FiniteDifferences | None,
    method: str = "exact",
    growth: float = 1.0,
    drift: float = 0.0,
    derivatives: float | None = 0.0,
) -> tuple[str, tuple[str, ...]]:
    return judge(method, Checks(found, derivatives), growth, drift, 1e-10)


@pytest.mark.parametrize(
    ("error", "verdict"),
    [
        (0.0, "reliable"),
        (RELIABLE, "reliable"),
        (RELIABLE + 0.01, "doubtful"),
        (DOUBTFUL, "doubtful"),
        (DOUBTFUL + 0.01, "meaningless"),
        (50.0, "meaningless"),
        (math.inf, "meaningless"),
        (math.nan, "meaningless"),
    ],
)
def test_the_verdict_rests_on_the_top_of_the_ladder(error, verdict):
    for low in (0.0, 99.0):
        given, reasons = verdict_of(found(error, low))
        assert given == verdict
        assert f"relative error {error:.2f}" in reasons[0]
        assert "removing 2 examples" in reasons[0]
        assert len(reasons) == (1 if verdict == "reliable" else 2)


def test_unchecked_says_so():
    assert verdict_of(None, derivatives=None) == ("unchecked", ())


TROUBLES = [
    ({"growth": GROWTH * 1.01}, {"growth": GROWTH}, "the adjoint grew 1.0e+04 times"),
    ({"drift": 1.1e-10}, {"drift": 1e-10}, "the replay ended 1.1e-10"),
    ({"derivatives": 1.1e-3}, {"derivatives": DERIVATIVES}, "torch's derivatives of this model are off by 1.1e-03"),
]


@pytest.mark.parametrize(("trouble", "none", "words"), TROUBLES, ids=["growth", "drift", "derivatives"])
@pytest.mark.parametrize(
    ("before", "after"),
    [(0.1, "doubtful"), (IN_BETWEEN, "doubtful"), (2.0, "meaningless"), (None, "doubtful")],
    ids=["reliable", "doubtful", "meaningless", "unchecked"],
)
def test_trouble_takes_reliability_away_and_says_why(trouble, none, words, before, after):
    checked = None if before is None else found(before)
    plain, few = verdict_of(checked)
    given, reasons = verdict_of(checked, **trouble)
    assert given == after
    assert reasons[: len(few)] == few
    (told,) = reasons[len(few) :]
    assert words in told
    assert verdict_of(checked, **none) == (plain, few)  # the limit itself is allowed


def test_every_trouble_is_told():
    verdict, reasons = verdict_of(found(0.1), growth=1e9, drift=1.0, derivatives=1.0)
    assert verdict == "doubtful"
    assert len(reasons) == 4
    assert verdict_of(found(0.1), derivatives=None)[0] == "reliable"  # not measured is not wrong


def test_what_may_help_depends_on_the_method():
    assert "exact" in verdict_of(found(IN_BETWEEN), "hessian-free")[1][1]
    assert "exact" in verdict_of(found(IN_BETWEEN), "gauss-newton")[1][1]
    assert "not linear" in verdict_of(found(IN_BETWEEN, low=0.1))[1][1]
    assert "learning rate" in verdict_of(found(IN_BETWEEN, low=IN_BETWEEN))[1][1]


# ---------------------------------------------------------------------------------------------------------------
# Finite differences against a loop written by hand

PROBLEM = case("mlp_tanh")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(recipe_of(PROBLEM), tmp_path_factory.mktemp("checks") / "run")


def measured(run: hg.Run, weights: Tensor, until: int | None) -> Tensor:
    """Every query's loss of the model trained with these weights."""
    state = run.replay(weights=weights, until=until)
    model = PROBLEM.build().eval()
    model.load_state_dict({**state.params, **state.buffers})
    inputs, labels = (torch.stack(parts) for parts in zip(*PROBLEM.queries, strict=True))
    return PROBLEM.loss(model, (inputs, labels)).detach()


def by_hand(run: hg.Run, touched: Sequence[int], h: float, until: int | None = None) -> Tensor:
    """(m(1 - h) - m(1 + h)) / 2h: what the scores of these examples together predict."""
    ends = [with_weights(run, touched, sign * h, until) for sign in (-1, 1)]
    return (ends[0] - ends[1]) / (2 * h)


def with_weights(run: hg.Run, touched: Sequence[int], change: float, until: int | None = None) -> Tensor:
    weights = torch.ones(N_TRAIN, dtype=torch.float64)
    for i in touched:
        weights[i] += change
    return measured(run, weights, until)


AGGREGATES: list[tuple[Any, Callable[[Tensor], Tensor]]] = [
    (None, lambda m: m),
    ("mean", lambda m: m.mean().reshape(1)),
    ("sum", lambda m: m.sum().reshape(1)),
    (torch.tensor([1, 0, 1, 2]), lambda m: torch.stack([m[1], m[0] + m[2], m[3]])),
]
MEMBERS = {
    "every example": torch.arange(N_TRAIN),
    "groups": torch.tensor([0, 2, 2, 1, 0, 2, 1, 1, 0, 0, 2, 0]),
    "chosen": torch.tensor([-1, 0, -1, 2, 1, -1, -1, 3, -1, -1, 4, 5]),
}


@pytest.mark.parametrize("members", MEMBERS.values(), ids=list(MEMBERS))
@pytest.mark.parametrize(("aggregate", "combined"), AGGREGATES, ids=["none", "mean", "sum", "groups"])
@pytest.mark.parametrize("until", [None, 2])
def test_finite_differences_are_those_of_a_loop_by_hand(run, aggregate, combined, members, until):
    step = run.num_steps if until is None else until
    names = tuple(name for name, _ in run.problem.model.named_parameters())
    queries = Queries(run.problem, PROBLEM.queries, names, None, torch.device("cpu"), "samples")
    columns = Columns.make(aggregate, N_QUERY)
    scores = torch.randn(int(members.max()) + 1, columns.count, dtype=torch.float64)
    result = finite_differences(run, queries, columns, scores, members, step, seed=5)
    rows = members[list(result.examples)].unique()
    seen = {i for record in run.steps[:step] for ids in record.batches for i in ids.tolist()}
    usable = {int(members[i]) for i in seen} - {-1}
    assert len(rows) == min(FEW, len(usable))
    assert set(rows.tolist()) <= usable  # an example that no step saw shows nothing
    assert list(result.examples) == [i for i in range(N_TRAIN) if members[i] in rows]  # whole groups
    steps = [rung.step for rung in result.ladder]
    assert steps in ([*LADDER], [SMALLER, *LADDER])
    trained = measured(run, torch.ones(N_TRAIN, dtype=torch.float64), until)
    for rung in result.ladder:
        change, predicted = combined(by_hand(run, result.examples, rung.step, until)), scores[rows].sum(0)
        assert_close(doubles(rung.error), ((change - predicted).norm() / change.norm()).reshape(1), SAME)
        if columns.count >= 3:
            expected = torch.corrcoef(torch.stack([change, predicted]))[0, 1]
            assert_close(doubles(rung.correlation), expected.reshape(1), SAME)
        else:
            assert math.isnan(rung.correlation)
        off = [
            combined(with_weights(run, result.examples, sign * rung.step, until) - trained)
            + sign * rung.step * predicted
            for sign in (-1, 1)
        ]
        expected = torch.stack(off).norm() / (2**0.5 * rung.step * predicted.norm())
        assert_close(doubles(rung.remainder), expected.reshape(1), SAME)
        assert (rung.remainder <= REMAINDER) or rung.step != LADDER[0] or steps[0] == SMALLER


def test_the_seed_chooses_the_examples(run):
    def check(seed: int) -> hg.Diagnostics:
        return hg.attribute(run, PROBLEM.queries, seed=seed, progress=False).diagnostics

    assert check(0).examples == check(0).examples
    assert check(0).ladder[1].error == pytest.approx(check(0).ladder[1].error, rel=1e-9)
    assert len({check(seed).examples for seed in range(4)}) > 1
    assert check(3).seed == 3


# ---------------------------------------------------------------------------------------------------------------
# All of it, through `hg.attribute`


@pytest.fixture(scope="module")
def gentle(tmp_path_factory):
    recipe = recipe_of(PROBLEM, hyper={"lr": 0.02})
    return recorded(recipe, tmp_path_factory.mktemp("checks") / "gentle")


def test_a_gentle_run_is_reliable(gentle):
    diagnostics = hg.attribute(gentle, PROBLEM.queries, progress=False).diagnostics
    assert diagnostics.verdict == "reliable"
    assert len(diagnostics.reasons) == 1
    assert [rung.step for rung in diagnostics.ladder] == [0.1, 1.0]
    assert diagnostics.ladder[0].error < 0.01
    assert diagnostics.ladder[0].correlation > 0.999
    assert diagnostics.drift == 0.0
    assert diagnostics.derivative_error is not None
    assert diagnostics.derivative_error < 1e-6
    assert 0 < diagnostics.check_seconds < diagnostics.seconds


def test_dropping_a_strong_curvature_is_not_reliable(tmp_path):
    """Regression over many passes: an early step's effect is undone by the curvature, which hessian-free ignores."""
    problem = case("regression")
    epochs = [[[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]] * 30
    steps = [step for epoch in epochs for step in epoch]
    recipe = recipe_of(problem, hyper={"lr": 0.05}, steps=steps)
    run = recorded(recipe, tmp_path / "run", epochs)
    free = hg.attribute(run, problem.queries, method="hessian-free", progress=False).diagnostics
    assert free.verdict != "reliable"
    assert any("drops the curvature" in reason and "exact" in reason for reason in free.reasons)
    full = hg.attribute(run, problem.queries, method="exact", progress=False).diagnostics
    assert full.ladder[0].error < 0.1 < free.ladder[0].error
    assert full.verdict == "reliable"


def test_growth_is_measured(gentle, tmp_path):
    """At a high learning rate the adjoint grows as the product of I - lr H does; without check that is still told."""
    assert hg.attribute(gentle, PROBLEM.queries, check=False).diagnostics.growth < 2
    epochs = [[[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]]] * 12
    steps = [step for epoch in epochs for step in epoch]
    wild = recorded(recipe_of(PROBLEM, hyper={"lr": 30.0}, steps=steps), tmp_path / "run", epochs)
    diagnostics = hg.attribute(wild, PROBLEM.queries, check=False).diagnostics
    assert diagnostics.growth > GROWTH
    assert diagnostics.verdict == "doubtful"
    assert any("chaotic" in reason for reason in diagnostics.reasons)


def test_growth_step_by_step_is_that_of_the_closed_form(tmp_path):
    """loss |a w|^2 / 2 , one batch of all: every step back multiplies lam by 1 - lr A."""
    rows = torch.tensor([[1.0, 0.5], [0.2, -2.0], [0.7, 0.1], [-0.4, 1.5]], dtype=torch.float64)
    model, lr = nn.Linear(2, 1, bias=False).double(), 2.0

    def half_square(model: nn.Module, batch: Tensor) -> Tensor:
        return model(batch).flatten().square() / 2

    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    data: Any = list(rows)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for _ in range(6):
            for batch in recording.batches(DataLoader(data, batch_size=4)):
                optimizer.zero_grad()
                half_square(model, batch).mean().backward()
                optimizer.step()
    run = hg.load(tmp_path / "run", model=model, loss=half_square, data=data)
    found = hg.attribute(run, data[:2], measurement=lambda m, b: m(b).flatten(), check=False).diagnostics
    back, lam, expected = torch.eye(2, dtype=torch.float64) - lr * rows.T @ rows / 4, rows[:2], []
    for step in reversed(range(6)):
        lam = lam @ back
        expected.append((step, float((lam.norm(dim=1) / rows[:2].norm(dim=1)).max())))
    assert [step for step, _ in found.growth_by_step] == list(range(6))
    assert_close(doubles(*(g for _, g in found.growth_by_step)), doubles(*(g for _, g in reversed(expected))), SAME)
    assert found.growth == max(g for _, g in found.growth_by_step)
    assert found.growth > 1.5  # it does grow here


def test_without_check_nothing_is_claimed(gentle):
    diagnostics = hg.attribute(gentle, PROBLEM.queries, check=False).diagnostics
    assert diagnostics.verdict == "unchecked"
    assert diagnostics.reasons == diagnostics.ladder == diagnostics.examples == ()
    assert diagnostics.derivative_error is not None
    assert diagnostics.derivative_error < 1e-6
    assert math.isnan(diagnostics.finite_difference_error)
    assert diagnostics.check_seconds == 0.0


def test_groups_and_epochs_are_checked_by_their_sums(gentle):
    """The same examples are removed, so the same change is measured and predicted, however the rows are cut."""
    everything = torch.zeros(N_TRAIN, dtype=torch.int64)
    whole = hg.attribute(gentle, PROBLEM.queries, groups=everything, progress=False).diagnostics
    split = hg.attribute(gentle, PROBLEM.queries, groups=everything, by_epoch=True, progress=False).diagnostics
    assert whole.examples == split.examples == tuple(range(N_TRAIN))
    for a, b in zip(whole.ladder, split.ladder, strict=True):
        assert a.error == pytest.approx(b.error, rel=1e-6)
    assert whole.ladder[0].error < 0.1
