"""Around smoothed scores: what goes on after a kill, is planned, checked, said and refused."""

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hydragrad as hg
from hydragrad import attributing, smoothing
from hydragrad.hypergradient import rehearsing
from hydragrad.hypergradient import watch as watching
from hydragrad.hypergradient.choosing import Fixed
from tests.hypergradient.recorded import STEPS, recipe_of, recorded, values
from tests.zoo import N_TRAIN, case

PROBLEM = case("mlp_tanh")
# Removed, halved, doubled and untouched examples; no batch without any that counts.
WEIGHTS = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0, 1.0, 1.0, 0.0, 2.0, 1.0, 1.3, 0.0], dtype=torch.float64)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return recorded(recipe_of(PROBLEM), tmp_path_factory.mktemp("smoothing") / "run")


def test_a_killed_sweep_goes_on_and_ends_the_same(run: hg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = attributing.plan_sweep
    fixed = Fixed("traced:reverse-over-reverse", 2, 3, 2)
    monkeypatch.setattr(attributing, "plan_sweep", lambda *a, again=None, **o: real(*a, again=again or fixed, **o))
    asked: dict[str, Any] = {"smoothing": 3, "fraction": 0.25, "progress": False, "check": False}
    straight = hg.attribute(run, PROBLEM.queries, **asked, resume=tmp_path / "straight")
    watch, steps = attributing.Watch.__call__, 0

    def dies(self: Any, step: int, adjoint: Any) -> None:
        nonlocal steps
        steps += 1
        if steps == left:
            raise KeyboardInterrupt
        watch(self, step, adjoint)

    monkeypatch.setattr(attributing.Watch, "__call__", dies)
    left, calls = 12, 0  # of seven steps a piece: every call finishes one
    while True:
        steps, calls = 0, calls + 1
        try:
            again = hg.attribute(run, PROBLEM.queries, **asked, resume=tmp_path / "killed")
            break
        except KeyboardInterrupt:
            continue
    assert calls > 3
    assert torch.equal(again.values, straight.values)
    assert again.diagnostics.smoothing == straight.diagnostics.smoothing
    with pytest.raises(hg.MismatchError, match="smoothing"):
        hg.attribute(run, PROBLEM.queries, smoothing=3, fraction=0.5, check=False, resume=tmp_path / "killed")
    with pytest.raises(hg.MismatchError, match="smoothing"):
        hg.attribute(run, PROBLEM.queries, check=False, resume=tmp_path / "killed")


def test_the_plan_counts_the_runs(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()  # a clock by which everything takes as long as everything else
    monkeypatch.setattr(rehearsing, "quiet_seconds", lambda: 1e-3 * next(ticks))
    one, four = (hg.plan(run, 6, block=2, compile=False, smoothing=runs) for runs in (1, 4))
    plain = hg.plan(run, 6, block=2, compile=False)
    assert (plain.reweighted, one.reweighted, four.reweighted) == (0, 1, 4)
    assert four.sweeps == 4 * one.sweeps == 4 * plain.sweeps
    assert four.seconds > 2 * one.seconds
    assert "4 reweighted run(s)" in str(four)
    assert "reweighted" not in str(plain)
    assert one.segment == math.isqrt(len(STEPS) - 1) + 1


def test_the_bar_counts_every_step_of_every_run(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []
    real = watching.tqdm

    def noted(*args: Any, **options: Any) -> Any:
        bars.append(real(*args, **{**options, "disable": False, "delay": 1e9}))
        return bars[-1]

    monkeypatch.setattr(watching, "tqdm", noted)
    hg.attribute(run, PROBLEM.queries, smoothing=3, fraction=0.25, check=False, progress=False)
    assert bars[0].n == bars[0].total == (3 + 3) * len(STEPS)  # each run is taken, and swept


def test_the_check_compares_with_retraining_without_other_subsets(run: hg.Run) -> None:
    scores = hg.attribute(run, PROBLEM.queries, smoothing=4, fraction=0.25, seed=3)
    found = scores.diagnostics.smoothing
    assert found is not None
    assert (found.runs, found.fraction, found.subsets) == (4, 0.25, smoothing.SUBSETS)
    assert scores.diagnostics.ladder == ()
    before = losses(run, None)
    generator = torch.Generator().manual_seed(4)
    actual, predicted = [], []
    for _ in range(found.subsets):
        removed = torch.randperm(N_TRAIN, generator=generator)[:3]
        actual.append(losses(run, torch.ones(N_TRAIN).index_fill(0, removed, 0.0)) - before)
        predicted.append(scores.values[removed].sum(0))
    a, p = (torch.stack(x) - torch.stack(x).mean(0) for x in (actual, predicted))
    assert found.correlation == pytest.approx(float((a * p).sum() / a.norm() / p.norm()), rel=1e-9)
    assert found.error == pytest.approx(float((a - p).norm() / a.norm()), rel=1e-9)
    said = str(scores.diagnostics)
    assert "4 runs without 0.25" in said
    assert "seed 3" in said
    assert "25%" in " ".join(scores.diagnostics.reasons)
    again = hg.Attribution.load(scores.save(run.trajectory.folder.parent / "scores.safetensors"))
    assert again.diagnostics == scores.diagnostics


def losses(run: hg.Run, weights: Tensor | None) -> Tensor:
    state = run.replay(weights=weights)
    model = PROBLEM.build()
    model.load_state_dict(state.params | state.buffers)
    inputs, labels = (torch.stack(x) for x in zip(*PROBLEM.queries, strict=True))
    return PROBLEM.loss(model.eval(), (inputs, labels)).detach()


@pytest.mark.parametrize(
    ("correlation", "verdict"), [(0.9, "reliable"), (0.4, "doubtful"), (0.1, "meaningless"), (math.nan, "meaningless")]
)
def test_verdicts(correlation: float, verdict: str) -> None:
    found = smoothing.Smoothing(8, 0.1, 0.2, 8, 0.5, correlation)
    assert smoothing.judge(found, "exact")[0] == verdict
    assert smoothing.judge(replace(found, failure="it diverged"), "exact")[0] == "meaningless"


@pytest.mark.parametrize("seed", range(3))
def test_scores_at_weights_are_checked_around_them(run: hg.Run, seed: int) -> None:
    found = hg.attribute(run, PROBLEM.queries, weights=WEIGHTS, seed=seed).diagnostics
    assert found.smoothing is None
    assert found.ladder[0].error < 0.1
    assert not set(found.examples) & {1, 7, 11}  # removed ones are not removed again


def test_refusals(run: hg.Run) -> None:
    for wrong in (0, -1, True):
        with pytest.raises(hg.UnsupportedError, match="smoothing is no number"):
            values(run, PROBLEM.queries, smoothing=wrong)
    for wrong in (-0.1, 1.0, float("nan")):
        with pytest.raises(hg.UnsupportedError, match="fraction"):
            values(run, PROBLEM.queries, smoothing=2, fraction=wrong)
    with pytest.raises(hg.MismatchError, match="together"):
        values(run, PROBLEM.queries, smoothing=2, weights=WEIGHTS)
    with pytest.raises(hg.MismatchError, match="weights do not fit"):
        values(run, PROBLEM.queries, weights=WEIGHTS[1:])
    with pytest.raises(hg.NonFiniteError, match="weights"):
        values(run, PROBLEM.queries, weights=WEIGHTS * math.nan)
    with pytest.raises(hg.UnsupportedError, match="smoothing is no number"):
        hg.plan(run, 3, smoothing=0)
