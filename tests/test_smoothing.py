"""Scores of reweighted runs against dense oracles at those weights; their means, their states."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hydragrad as hg
from hydragrad import attributing
from hydragrad.hypergradient.choosing import Fixed
from hydragrad.scoring import Rows, Scores
from hydragrad.smoothing import ABSENT, even_fraction, removals
from hydragrad.trajectory import moments
from hydragrad.trajectory.reweighted import Reweighted, first_touched
from tests.hypergradient.recorded import STEPS, load, recipe_of, recorded, train, values
from tests.hypergradient.test_oracle_agreement import by_label
from tests.oracles import Clip, recursion, unroll
from tests.step.options import CHOSEN, option_id
from tests.tolerances import FINITE_DIFFERENCE, ORACLE, SAME, assert_close, relative_error
from tests.trajectory.loops import assert_same_params, bind, record_run
from tests.zoo import DRAWING, N_TRAIN, case

PROBLEM = case("mlp_tanh")
METHODS = ["exact", "gauss-newton", "hessian-free"]
# Removed, halved, doubled and untouched examples; no batch without any that counts.
WEIGHTS = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 2.0, 1.0, 1.3, 0.0], dtype=torch.float64)
ADAMW = {"lr": 0.02, "weight_decay": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return recorded(recipe_of(PROBLEM), tmp_path_factory.mktemp("smoothing") / "run")


def assert_as_the_oracle(recipe: Any, run: hg.Run, queries: Any, methods: Any = METHODS, **more: Any) -> None:
    at = replace(recipe, weights=WEIGHTS)
    for method in methods:
        expected = unroll(at).scores(queries) if method == "exact" else recursion(at, method).scores(queries)
        assert_close(values(run, queries, method, weights=WEIGHTS, **more), expected, ORACLE)


# ---------------------------------------------------------------------------------------------------------------
# One reweighted run


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["mlp_tanh", "mlp_relu", "regression", "token_loss", "batchnorm", *DRAWING[:4]])
def test_models_and_methods(name: str, method: str, tmp_path: Path) -> None:
    problem = case(name)
    recipe = recipe_of(problem)
    run = recorded(recipe, tmp_path / "run")
    assert_as_the_oracle(recipe, run, problem.queries, [method])
    as_trained = values(run, problem.queries, method)
    assert relative_error(values(run, problem.queries, method, weights=WEIGHTS), as_trained) > 0.01


@pytest.mark.parametrize("name", ["convnet", "groupnorm", "attention", "lstm", "tied", "embedding", "noisy_loss"])
def test_other_models(name: str, tmp_path: Path) -> None:
    problem = case(name)
    recipe = recipe_of(problem)
    assert_as_the_oracle(recipe, recorded(recipe, tmp_path / "run"), problem.queries, ["exact"])


@pytest.mark.parametrize("option", CHOSEN, ids=option_id)
def test_optimizers(option: tuple[str, Any], tmp_path: Path) -> None:
    recipe = recipe_of(PROBLEM, *option)
    assert_as_the_oracle(recipe, recorded(recipe, tmp_path / "run"), PROBLEM.queries)


@pytest.mark.parametrize("reduction", ["sum", by_label], ids=["sum", "function"])
def test_reductions(reduction: Any, tmp_path: Path) -> None:
    recipe = recipe_of(PROBLEM, hyper={"lr": 0.02, "momentum": 0.9}, reduction=reduction)
    assert_as_the_oracle(recipe, recorded(recipe, tmp_path / "run"), PROBLEM.queries)


@pytest.mark.parametrize("clip", [0.2, [Clip(0.05, None), Clip(0.1)]], ids=["norm", "value and norm"])
def test_clipping(clip: Any, tmp_path: Path) -> None:
    """The norm is that of the reweighted gradient."""
    recipe = recipe_of(PROBLEM, clip=clip)
    assert_as_the_oracle(recipe, recorded(recipe, tmp_path / "run"), PROBLEM.queries)


def test_accumulation_with_buffers_and_a_penalty(tmp_path: Path) -> None:
    problem = case("batchnorm")
    epochs = [[[[0, 1, 2], [3, 4]], [[5, 6], [7, 5, 8]], [[9, 1], [10, 11]]], [[[4, 4, 2], [0, 4]]]]

    def penalty(params: Any) -> Tensor:
        return 0.01 * params["0.weight"].pow(4).sum()

    steps = [step for epoch in epochs for step in epoch]
    recipe = recipe_of(problem, "AdamW", {**ADAMW, "eps": 1e-4}, steps=steps, penalty=penalty)
    train(recipe, tmp_path / "run", epochs)
    run = load(recipe, tmp_path / "run", penalty=lambda model: penalty(dict(model.named_parameters())))
    assert_as_the_oracle(recipe, run, problem.queries)


def test_batchnorm_frozen_midway(tmp_path: Path) -> None:
    problem = case("batchnorm")

    def modes(model: nn.Module, t: int) -> None:
        model.get_submodule("1").train(t < 4)

    recipe = recipe_of(problem, modes=modes)
    assert_as_the_oracle(recipe, recorded(recipe, tmp_path / "run"), problem.queries)


@pytest.mark.parametrize("more", [{"block": 1}, {"block": 3}, {"memory": 1}, {"compile": False}], ids=str)
@pytest.mark.parametrize("method", METHODS)
def test_however_it_is_cut(run: hg.Run, method: str, more: dict[str, Any]) -> None:
    assert_as_the_oracle(recipe_of(PROBLEM), run, PROBLEM.queries, [method], **more)


@pytest.mark.parametrize("until", [1, 4, 6])
def test_an_earlier_step(run: hg.Run, until: int) -> None:
    expected = unroll(replace(recipe_of(PROBLEM), weights=WEIGHTS)).scores(PROBLEM.queries, t=until)
    assert_close(values(run, PROBLEM.queries, weights=WEIGHTS, step=until), expected, ORACLE)


def test_traced_graphs_take_the_weights_as_data(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine, traced at the first weights, is right at all others."""
    real = attributing.plan_sweep
    kept = Fixed("traced:reverse-over-reverse", 2, 3, 2)
    monkeypatch.setattr(attributing, "plan_sweep", lambda *a, again=None, **o: real(*a, again=kept, **o))
    for weights in (None, WEIGHTS, WEIGHTS.flip(0), torch.full_like(WEIGHTS, 0.7)):
        found = hg.attribute(run, PROBLEM.queries, check=False, weights=weights)
        assert "traced" in found.diagnostics.plan
        assert_close(found.values, unroll(replace(recipe_of(PROBLEM), weights=weights)).scores(PROBLEM.queries), ORACLE)


def test_a_removed_example_has_a_score(run: hg.Run) -> None:
    """By how much the queries would fall if it came back: a finite difference from weight zero."""
    found = values(run, PROBLEM.queries, weights=WEIGHTS)
    one = torch.zeros_like(WEIGHTS)
    one[1] = 1.0

    def measured(weights: Tensor) -> Tensor:
        state = run.replay(weights=weights)
        model = PROBLEM.build()
        model.load_state_dict(state.params | state.buffers)
        inputs, labels = (torch.stack(x) for x in zip(*PROBLEM.queries, strict=True))
        return PROBLEM.loss(model.eval(), (inputs, labels)).detach()

    h = 1e-5
    slope = (measured(WEIGHTS - h * one) - measured(WEIGHTS + h * one)) / (2 * h)
    assert_close(found[1], slope, FINITE_DIFFERENCE)
    assert found[1].abs().min() > 0


# ---------------------------------------------------------------------------------------------------------------
# Means over several


def test_nothing_removed_is_exact(run: hg.Run) -> None:
    expected = values(run, PROBLEM.queries)
    assert torch.equal(values(run, PROBLEM.queries, weights=torch.ones(N_TRAIN)), expected)
    for runs in (1, 3):
        assert_close(values(run, PROBLEM.queries, smoothing=runs, fraction=0.0), expected, SAME)


PLAIN = [[[[0, 1, 2, 3]], [[4, 5, 6, 7]], [[8, 9, 10, 11]]], [[[7, 2, 11, 5]], [[3, 8, 6, 0]]]]  # no example twice


def counted(scores: Tensor, weights: Tensor) -> Tensor:
    """Scores [N, M] of one run: those of examples that it lacked count half."""
    return torch.stack([row * ABSENT if w == 0 else row for row, w in zip(scores, weights, strict=True)])


def mean_of(single: Sequence[Tensor], sizes: Sequence[Tensor], runs: Tensor) -> Tensor:
    weights = 1 / torch.stack(list(sizes))[:, None]
    found = [counted(scores, w) for scores, w in zip(single, runs, strict=True)]
    return (torch.stack(found) * weights).sum(0) / weights.sum(0)


def test_several_runs_count_inversely_to_their_sizes(tmp_path: Path) -> None:
    recipe = recipe_of(PROBLEM, steps=[step for epoch in PLAIN for step in epoch])
    run = recorded(recipe, tmp_path / "run", PLAIN)
    weights = removals(N_TRAIN, 3, 0.25, seed=5)
    dense = [unroll(replace(recipe, weights=w)).scores_by_step(PROBLEM.queries) for w in weights]
    found = values(run, PROBLEM.queries, smoothing=3, fraction=0.25, seed=5)
    sizes = [d.square().sum((0, 1)).sqrt() for d in dense]
    assert max(float((s / sizes[0] - 1).abs().max()) for s in sizes) > 0.05
    assert_close(found, mean_of([d.sum(0) for d in dense], sizes, weights), ORACLE)


@pytest.mark.parametrize("method", METHODS)
def test_two_runs_are_between_both(run: hg.Run, method: str) -> None:
    """For every query the mean is one combination of the two runs' scores."""
    weights = removals(N_TRAIN, 2, 0.25, seed=5)
    assert (weights == 0).sum(1).tolist() == [3, 3]
    dense = [recursion(replace(recipe_of(PROBLEM), weights=w), method).scores(PROBLEM.queries) for w in weights]
    at = [counted(scores, w) for scores, w in zip(dense, weights, strict=True)]
    found = values(run, PROBLEM.queries, method, smoothing=2, fraction=0.25, seed=5)
    share = ((found - at[0]) * (at[1] - at[0])).sum(0) / (at[1] - at[0]).square().sum(0)
    assert ((share > 0.05) & (share < 0.95)).all()
    assert_close(found, at[0] + share * (at[1] - at[0]), ORACLE)


def test_subsets_are_drawn_from_the_seed_and_begin_alike() -> None:
    assert torch.equal(removals(100, 8, 0.1, 3)[:4], removals(100, 4, 0.1, 3))
    assert not torch.equal(removals(100, 4, 0.1, 3), removals(100, 4, 0.1, 4))
    assert (removals(100, 8, 0.1, 3) == 0).sum(1).tolist() == [10] * 8
    assert (removals(100, 2, 0.0, 3) == 1).all()
    assert (removals(3, 2, 0.99, 3) == 1).sum(1).tolist() == [1, 1]  # somebody is left


@pytest.mark.parametrize(("count", "runs", "fraction"), [(100, 10, 0.1), (97, 16, 0.125), (50, 7, 0.4), (9, 5, 0.8)])
def test_every_example_is_missing_equally_often(count: int, runs: int, fraction: float) -> None:
    missing = removals(count, runs, fraction, 3) == 0
    assert missing.sum(1).tolist() == [round(fraction * count)] * runs
    often = missing.sum(0)
    assert int(often.max() - often.min()) <= 1
    assert not torch.equal(often.sort().values, often) or int(often.max()) == int(often.min())  # by chance, not by id


def test_the_fraction_divides_the_runs_evenly() -> None:
    assert [even_fraction(runs) for runs in (1, 2, 4, 8, 10, 16, 20)] == [0.125, 0.125, 0.125, 0.125, 0.1, 0.125, 0.1]


def test_a_run_far_out_does_not_rule_the_mean() -> None:
    scores = Scores(run_of(2), 1, Rows(torch.arange(3), torch.arange(3)), 2, False, torch.float64, runs=3)
    for factor in (1.0, 1e6, 1.0):
        found = torch.tensor([[[1.0, 2.0], [0.0, 1.0], [2.0, 0.0]]], dtype=torch.float64) * factor
        scores.put(slice(0, 2), found, torch.tensor([3.0, 3.0], dtype=torch.float64) * factor)
    scores.put(slice(0, 2), torch.zeros(1, 3, 2, dtype=torch.float64), torch.zeros(2, dtype=torch.float64))
    scores.finish()
    assert scores.values.max() < 3.1 * 2
    assert scores.values.isfinite().all()


def run_of(epochs: int) -> Any:
    """What Scores looks at of a run."""
    return SimpleNamespace(steps=[SimpleNamespace(epochs=(), epoch=epoch) for epoch in range(epochs)])


def test_what_else_can_be_asked(run: hg.Run) -> None:
    """Groups, epochs, rows, aggregates and earlier steps say of means what they say of one run's scores."""
    asked: dict[str, Any] = {"smoothing": 3, "fraction": 0.25, "seed": 1}
    whole = values(run, PROBLEM.queries, **asked)
    numbers = torch.arange(N_TRAIN) % 3
    groups = values(run, PROBLEM.queries, groups=numbers, **asked)
    assert_close(groups, torch.stack([whole[numbers == g].sum(0) for g in range(3)]), SAME)
    epochs = values(run, PROBLEM.queries, by_epoch=True, **asked)
    assert epochs.shape == (3, *whole.shape)
    assert_close(epochs.sum(0), whole, SAME)
    assert_close(values(run, PROBLEM.queries, train=[7, 2], **asked), whole[[7, 2]], SAME)
    # a mean of queries is a query of its own: one of all its runs, each of its own size
    mean = values(run, PROBLEM.queries, aggregate="mean", **asked)
    runs = removals(N_TRAIN, 3, 0.25, 1)
    single = [counted(values(run, PROBLEM.queries, aggregate="mean", weights=w), w)[:, 0] for w in runs]
    assert torch.linalg.matrix_rank(torch.stack([*single, mean[:, 0]]), rtol=1e-9) == 3
    for more in ({"block": 1}, {"memory": 1}):
        assert_close(values(run, PROBLEM.queries, **{**asked, **more}), whole, SAME)
    early = values(run, PROBLEM.queries, step=3, **asked)
    dense = [unroll(replace(recipe_of(PROBLEM), weights=w)).scores_by_step(PROBLEM.queries, t=3)[:3] for w in runs]
    sizes = [d.square().sum((0, 1)).sqrt() for d in dense]  # the first three steps have no example twice
    assert_close(early, mean_of([d.sum(0) for d in dense], sizes, runs), ORACLE)


def test_scores_of_tokens(tmp_path: Path) -> None:
    problem = case("token_loss")
    run = recorded(recipe_of(problem), tmp_path / "run")
    asked: dict[str, Any] = {"smoothing": 2, "fraction": 0.25}
    each = values(run, problem.queries, tokens=True, **asked)
    assert each.dim() == 3
    assert_close(each.sum(1), values(run, problem.queries, **asked), SAME)


def test_the_spread_is_the_standard_error(tmp_path: Path) -> None:
    recipe = recipe_of(PROBLEM, steps=[step for epoch in PLAIN for step in epoch])
    run = recorded(recipe, tmp_path / "run", PLAIN)
    runs = removals(N_TRAIN, 4, 0.25, 2)
    dense = [unroll(replace(recipe, weights=w)).scores_by_step(PROBLEM.queries) for w in runs]
    single = zip(dense, runs, strict=True)
    scaled = torch.stack([counted(d.sum(0), w) / d.square().sum((0, 1)).sqrt() for d, w in single])
    found = hg.attribute(run, PROBLEM.queries, smoothing=4, fraction=0.25, seed=2, check=False).diagnostics.smoothing
    assert found is not None
    expected = (scaled.var(0).sum() / 4).sqrt() / scaled.mean(0).norm()
    assert found.spread == pytest.approx(float(expected), rel=1e-6)


# ---------------------------------------------------------------------------------------------------------------
# The run that is swept


@pytest.mark.parametrize("most", [1, 2, 3, 100])
def test_its_states_are_those_of_a_replay(run: hg.Run, most: int) -> None:
    seen: list[int] = []
    made = Reweighted(run.replayer(), run.trajectory, WEIGHTS, len(STEPS), most, lambda: seen.append(1))
    assert len(seen) == len(STEPS)
    assert made.checkpoints[0] == 0
    assert made.checkpoints[-1] == len(STEPS)
    assert len(made.checkpoints) <= most + 2
    assert most < len(STEPS) or made.checkpoints == (0, len(STEPS))  # what a sweep can hold is not kept twice
    for step in made.checkpoints:
        state, expected = made.state(step), run.replay(weights=WEIGHTS, until=step)
        assert state.step == step
        assert all(torch.equal(x, state.params[name]) for name, x in expected.params.items())
    assert [made.nearest(t) for t in range(len(STEPS) + 1)] == [
        max(c for c in made.checkpoints if c <= t) for t in range(len(STEPS) + 1)
    ]


def test_drift_of_a_reweighted_run_is_told_and_no_meddling(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its states come from a replay: where that cannot be repeated, nothing else changed them."""
    made = Reweighted(run.replayer(), run.trajectory, WEIGHTS, len(STEPS), 100)
    monkeypatch.setattr(moments, "state_difference", lambda *_: 0.5)
    back = moments.Backwards(run.replayer(), made, len(STEPS), 100)
    assert [moment.record.index for moment in back] == list(reversed(range(len(STEPS))))
    assert back.drift == {len(STEPS): 0.5}
    with pytest.raises(hg.MismatchError, match="is not what the recorded steps make"):
        list(moments.Backwards(run.replayer(), run.trajectory, len(STEPS), 100))


def test_it_begins_where_the_weights_begin_to_matter(tmp_path: Path) -> None:
    record_run(tmp_path / "run", epochs=2, checkpoint_every=3)
    run = bind(tmp_path / "run")
    weights = torch.ones(run.num_examples)
    assert first_touched(run.steps, weights) == run.num_steps == 10
    made = Reweighted(run.replayer(), run.trajectory, weights, 10, 2)
    assert made.checkpoints == run.trajectory.checkpoints == (0, 3, 6, 9, 10)
    weights[run.steps[4].batches[0][0]] = 0.0  # not seen before step 4
    taken: list[int] = []
    made = Reweighted(run.replayer(), run.trajectory, weights, 10, 3, lambda: taken.append(1))
    assert made.checkpoints == (0, 3, 6, 9, 10)
    assert len(taken) == 10 - 3
    assert_same_params(made.state(3).params, run.trajectory.state(3).params)
    assert_same_params(made.state(9).params, run.replay(weights=weights, until=9).params)
    assert not torch.equal(made.state(9).params["0.weight"], run.trajectory.state(9).params["0.weight"])
