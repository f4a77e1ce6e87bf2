"""Attributions in pieces give the same answer as without; their engines are found again by name."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import hydragrad as hg
from hydragrad import attributing, planning
from hydragrad.files import dumps, loads
from hydragrad.hypergradient import exact
from hydragrad.hypergradient.choosing import Fixed
from hydragrad.hypergradient.naming import name_of, named
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tracing import Traced, TracedFunction
from tests.hypergradient.recorded import values
from tests.resuming.pieces import FIXED, JOURNAL, QUERIES, STEPS, asked
from tests.tolerances import SAME, assert_close
from tests.zoo import N_TRAIN

ASKED: dict[str, dict[str, Any]] = {
    "exact": {},
    "gauss-newton": {"method": "gauss-newton"},
    "hessian-free": {"method": "hessian-free"},
    "by_epoch": {"by_epoch": True},
    "train": {"train": [5, 2], "step": 4},
    "groups": {"groups": [i % 3 for i in range(N_TRAIN)], "aggregate": [0, 1, 2, 3, 4] * 2 + [5]},
    "mean": {"aggregate": "mean", "check": True},
}


@pytest.mark.parametrize("options", ASKED.values(), ids=list(ASKED))
def test_pieces_make_the_same_answer_as_no_pieces(
    options: dict[str, Any], run: hg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: list[int]
) -> None:
    names = {"gauss-newton": "plain:jvp-then-vjp", "hessian-free": "plain:per-example-gradients"}
    kept = Fixed(names.get(options.get("method", ""), FIXED.engine), 2, 3, 2)
    real = attributing.plan_sweep
    monkeypatch.setattr(attributing, "plan_sweep", lambda *a, again=None, **o: real(*a, again=again or kept, **o))
    plain = asked(run, None, **options)
    whole = len(steps)
    first = asked(run, tmp_path / "pieces", **options)
    assert len(steps) == 2 * whole
    second = asked(run, tmp_path / "pieces", **options)
    assert len(steps) == 2 * whole  # nothing was swept again
    for scores in (first, second):
        assert torch.equal(scores.values, plain.values)
        assert torch.equal(scores.query_ids, plain.query_ids)
        assert torch.equal(scores.train_ids, plain.train_ids)
        assert scores.diagnostics.growth == plain.diagnostics.growth
        assert scores.diagnostics.drift == plain.diagnostics.drift
        assert scores.diagnostics.growth_by_step == plain.diagnostics.growth_by_step
        assert scores.diagnostics.drift_by_checkpoint == plain.diagnostics.drift_by_checkpoint
        assert str(scores.diagnostics.ladder) == str(plain.diagnostics.ladder)  # NaN is not NaN
    ordinary = {key: value for key, value in options.items() if key not in ("by_epoch", "check")}
    assert_close(plain.total, values(run, QUERIES, **ordinary), SAME)


def test_without_a_folder_nothing_is_kept(run: hg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attributing, "Pieces", lambda *_: pytest.fail("a folder was opened"))
    assert not any("piece" in part for part in asked(run, None).diagnostics.plan.split(";"))
    assert list(tmp_path.iterdir()) == []


def test_the_engine_that_began_ends_whatever_would_be_chosen_now(
    run: hg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    asked(run, tmp_path / "pieces")
    monkeypatch.undo()
    monkeypatch.setattr(planning, "choose", lambda *_, **__: pytest.fail("engines were measured again"))
    for path in (tmp_path / "pieces" / "pieces").iterdir():
        path.unlink() if path.name.startswith("00000003") else None
    lines = (tmp_path / "pieces" / JOURNAL).read_bytes().splitlines(keepends=True)
    (tmp_path / "pieces" / JOURNAL).write_bytes(b"".join(lines[:2]))
    plan = asked(run, tmp_path / "pieces", memory=1).diagnostics.plan
    assert "2 at a time, 4 sweep(s) of 3, 2 states kept" in plan
    assert "traced" in plan
    assert "reverse-over-reverse" in plan
    assert "as chosen when this attribution began" in plan
    assert "below what the smallest sweep needs" in plan


@pytest.mark.parametrize("name", ["double-backward", "reverse-over-reverse", "forward-over-reverse"])
@pytest.mark.parametrize("kind", ["plain", "traced"])
def test_every_engine_is_found_again_by_its_name(kind: str, name: str, run: hg.Run, monkeypatch: Any) -> None:
    again = Fixed(f"{kind}:{name}", 2, 5, 4)
    plan = planning.plan_sweep(
        Sweep.of(run), 11, "exact", rows=None, memory=None, block=None, compile=None, again=again
    )
    assert plan.fixed == Fixed(f"{kind}:{name}", 2, 5, 4)
    assert (plan.block, plan.carried, plan.segment, plan.sweeps) == (2, 5, 4, 3)
    assert name in plan.engine


@pytest.mark.parametrize(
    ("method", "name"),
    [("gauss-newton", "plain:output-jacobian"), ("hessian-free", "plain:per-example-gradients"),
     ("gauss-newton", "traced:jvp-then-vjp"), ("exact", "compiled:forward-over-reverse")],
)  # fmt: skip
def test_no_part_of_an_engine_made_by_name_remembers_what_was_called(method: str, name: str, run: hg.Run) -> None:
    engine = named(Sweep.of(run).objective, method, name, elementwise=True)
    assert name_of(engine) == name
    functions = [part for part in vars(engine).values() if isinstance(part, TracedFunction)]
    assert functions
    assert all(function.settled for function in functions)


def test_the_first_call_uses_the_engine_that_a_later_one_will_make(run: hg.Run, monkeypatch: Any) -> None:
    """The one that was measured may have traced more than the one that is made anew."""
    sweep, real = Sweep.of(run), planning.choose

    def choose(*args: Any, **options: Any) -> Any:
        chosen = real(*args, **options)
        return replace(chosen, engine=Traced(exact.ReverseOverReverse(sweep.objective)), block=3, reasons=("why",))

    monkeypatch.setattr(planning, "choose", choose)
    given: dict[str, Any] = {"rows": None, "memory": None, "block": None, "compile": None}
    for pieces in (False, True):
        plan = planning.plan_sweep(sweep, 11, "exact", pieces=pieces, **given)
        assert isinstance(plan.chosen.engine, Traced)
        assert plan.chosen.engine.function.settled == pieces
        assert plan.chosen.engine.engine.name == "reverse-over-reverse"
        assert plan.reasons[0] == "why"
        assert plan.fixed.engine == "traced:reverse-over-reverse"
    again = planning.plan_sweep(sweep, 11, "exact", pieces=True, again=plan.fixed, **given)
    assert again.chosen.engine is plan.chosen.engine
    assert again.fixed == plan.fixed


def test_pieces_take_about_a_minute(run: hg.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(**options: Any) -> planning.Plan:
        given = {"rows": None, "memory": 2**30, "block": 4, "compile": False, **options}
        return planning.plan_sweep(Sweep.of(run), 100_000, "exact", **given)

    def seconds(planned: planning.Plan) -> float:
        return planned.seconds / planned.sweeps

    whole = plan()
    monkeypatch.setattr(planning, "PIECE_SECONDS", seconds(whole) / 7)
    assert plan().sweeps <= 2 * whole.sweeps  # nothing changes without a folder
    parts = plan(pieces=True)
    assert parts.sweeps > 3 * whole.sweeps
    assert 0.3 < seconds(parts) / (seconds(whole) / 7) < 3  # both were measured, apart
    assert any("is a piece of about" in reason for reason in parts.reasons)
    monkeypatch.setattr(planning, "PIECE_SECONDS", 0.0)
    smallest = plan(pieces=True)
    replay = STEPS * smallest.chosen.replay
    assert smallest.carried >= 4  # a block at least, and as long as its replay
    assert seconds(smallest) < 8 * replay + STEPS * 8 * smallest.chosen.per_query


def test_questions_are_plain_values(run: hg.Run, begun: Path) -> None:
    question = loads((begun / JOURNAL).read_bytes().splitlines()[0])["question"]
    assert question["run"] == run.trajectory.identity
    assert question["measurement"] is None
    assert loads(dumps(question)) == question
