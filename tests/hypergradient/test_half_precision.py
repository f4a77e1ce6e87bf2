"""Steps under autocast: replayed so, differentiated in full precision, refused where the two are too far apart."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import hydragrad as hg
from hydragrad import checks
from hydragrad.diagnostics import Diagnostics
from hydragrad.hypergradient import consistency, sweeping
from hydragrad.hypergradient.consistency import HALF_PRECISION
from tests.oracles import Recipe, unroll
from tests.tolerances import relative_error
from tests.zoo import case

QUIET: dict[str, Any] = {"progress": False, "compile": False}


def run_under_autocast(name: str, path: Path) -> tuple[hg.Run, list[Any]]:
    problem = case(name, torch.float32)
    model = problem.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hg.record(path, model, optimizer) as recording:
        for batch in recording.batches(DataLoader(problem.samples, 4)):  # type: ignore[arg-type]
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = problem.loss(model, batch).mean()
            loss.backward()
            optimizer.step()
    return hg.load(path, model=model, loss=problem.loss, data=problem.samples), problem.queries


def test_within_the_usual_tolerance(tmp_path):
    run, queries = run_under_autocast("mlp_tanh", tmp_path / "run")
    assert hg.verify(run).exact
    scores = hg.attribute(run, queries, **QUIET)
    found = scores.diagnostics
    assert found.half_precision == "bfloat16"
    assert found.drift == 0.0
    assert found.gradient_gap is not None
    assert 1e-4 < found.gradient_gap < HALF_PRECISION
    told = (
        f"trained under autocast (bfloat16), differentiated in full precision: gradients {found.gradient_gap:.1%} apart"
    )
    assert told in str(found)
    assert not any("autocast" in reason for reason in found.reasons)
    assert Diagnostics.from_dict(found.to_dict()).half_precision == "bfloat16"
    exact = case("mlp_tanh")
    steps = [[list(range(i, i + 4))] for i in (0, 4, 8)]
    names = [name for name, _ in exact.build().named_parameters()]
    recipe = Recipe(exact.build(), exact.loss, exact.samples, steps, "SGD", [(names, {"lr": 0.1})])
    expected = unroll(recipe).scores(exact.queries)
    assert scores.values.dtype == torch.float32
    assert relative_error(scores.values, expected) < HALF_PRECISION  # what the rounding of training does to the scores


def test_at_the_limit_and_beyond_it(tmp_path, monkeypatch):
    run, queries = run_under_autocast("mlp_tanh", tmp_path / "run")
    gap = hg.attribute(run, queries, check=False, **QUIET).diagnostics.gradient_gap
    assert gap is not None
    at = hg.attribute(run, queries, check=False, drift_tolerance=gap, **QUIET)
    assert at.diagnostics.gradient_gap == gap
    refusal = r"not the gradient of the training step(.|\n)*autocast(.|\n)*insist with drift_tolerance=0\.0"
    for below in (0.999 * gap, gap / 10):
        with pytest.raises(hg.MismatchError, match=refusal):
            hg.attribute(run, queries, drift_tolerance=below, **QUIET)
        with pytest.raises(hg.MismatchError, match=refusal):
            hg.hypergradients(run, [0], drift_tolerance=below, progress=False)
    for number in (0.0, -1.0, float("nan")):
        with pytest.raises(hg.UnsupportedError, match=r"bad drift_tolerance.*above 0"):
            hg.attribute(run, queries, drift_tolerance=number, **QUIET)


def test_insisting_is_allowed_and_doubted(tmp_path, monkeypatch):
    """As if the usual tolerance were half of what this run needs."""
    run, queries = run_under_autocast("mlp_tanh", tmp_path / "run")
    gap = hg.attribute(run, queries, check=False, **QUIET).diagnostics.gradient_gap
    assert gap is not None
    for module in (sweeping, checks):
        monkeypatch.setattr(module, "HALF_PRECISION", gap / 2)
    with pytest.raises(hg.MismatchError, match=r"insist with drift_tolerance=") as refused:
        hg.attribute(run, queries, **QUIET)
    advised = float(str(refused.value).partition("insist with drift_tolerance=")[2].split(" ")[0])
    assert gap <= advised <= 1.1 * gap
    found = hg.attribute(run, queries, drift_tolerance=advised, **QUIET).diagnostics
    assert found.gradient_gap == gap
    assert found.verdict in ("doubtful", "meaningless")
    assert any("ran under autocast (torch.bfloat16): beyond the" in reason for reason in found.reasons)
    vectors = hg.hypergradients(run, [0], drift_tolerance=1.1 * gap, progress=False)
    assert vectors.diagnostics.gradient_gap == gap


def test_full_precision_is_not_forgiven(tmp_path, monkeypatch):
    """The tolerance of autocast does not extend to runs without it: there a gap is another function."""
    problem = case("mlp_tanh", torch.float32)
    model = problem.build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for batch in recording.batches(DataLoader(problem.samples, 4)):  # type: ignore[arg-type]
            optimizer.zero_grad()
            problem.loss(model, batch).mean().backward()
            optimizer.step()
    run = hg.load(tmp_path / "run", model=model, loss=problem.loss, data=problem.samples)
    real = consistency._norm
    monkeypatch.setattr(consistency, "_norm", lambda tensors: real(tensors) + 0.01)
    with pytest.raises(hg.MismatchError, match="not the gradient of the training step"):
        hg.attribute(run, problem.queries, **QUIET)
    assert hg.attribute(run, problem.queries, drift_tolerance=0.5, **QUIET).diagnostics.half_precision == ""
