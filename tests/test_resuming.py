"""Attributions in pieces: killed at any moment they go on, and end bit for bit as if nothing had happened."""

import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import hydragrad as hg
from hydragrad import attributing, planning
from hydragrad.files import dumps, loads, sha256
from hydragrad.hypergradient import exact
from hydragrad.hypergradient.choosing import Fixed
from hydragrad.hypergradient.naming import name_of, named
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tracing import Traced, TracedFunction
from hydragrad.journal import sealed
from hydragrad.resuming import _BEFORE, _close, summary
from tests.children import ended, fork, kill
from tests.faults import Disk, full
from tests.hypergradient.recorded import recipe_of, recorded, values
from tests.tolerances import SAME, assert_close
from tests.zoo import N_TRAIN, case

PROBLEM = case("mlp_tanh")
QUERIES = [*PROBLEM.queries, *PROBLEM.samples[:7]]  # 11
FIXED = Fixed("traced:reverse-over-reverse", 2, 3, 2)  # pieces of 3, 3, 3, 2 queries
STEPS = 7
JOURNAL = "sweep.jsonl"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return recorded(recipe_of(PROBLEM), tmp_path_factory.mktemp("resuming") / "run")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a long run would choose, here: with a folder or without one."""
    real = attributing.plan_sweep

    def plan_sweep(*args: Any, again: Fixed | None = None, **options: Any) -> planning.Plan:
        return real(*args, again=again or FIXED, **options)

    monkeypatch.setattr(attributing, "plan_sweep", plan_sweep)


def asked(run: hg.Run, folder: Path | None, **options: Any) -> hg.Attribution:
    return hg.attribute(run, QUERIES, **{"check": False, "progress": False, "resume": folder, **options})


def on_step(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Let ``act`` happen at every step of every sweep."""
    real = attributing.Watch.__call__

    def watch(self: Any, *args: Any) -> None:
        act()
        real(self, *args)

    monkeypatch.setattr(attributing.Watch, "__call__", watch)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with every step that is swept."""
    swept: list[int] = []
    on_step(monkeypatch, lambda: swept.append(1))
    return swept


# ---------------------------------------------------------------------------------------------------------------
# The same answer


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


# ---------------------------------------------------------------------------------------------------------------
# Killed


def test_sweeps_that_end_at_fifty_moments_go_on_and_end_the_same(
    run: hg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None, steps: list[int]
) -> None:
    """Of four pieces of seven steps; some die again and again, eight by a signal while they write or compute."""
    expected, chance, ends = asked(run, None).values, random.Random(1), 0
    assert len(steps) == 4 * STEPS
    attempt = 0
    while ends < 50:
        folder, attempt, left = tmp_path / f"{attempt}", attempt + 1, 4 * STEPS
        for _ in range(chance.choice([1, 1, 2, 3])):
            dies_at = chance.randrange(left + 1)  # after that many steps; at its end, if there are no more

            def work(folder: Path = folder, dies_at: int = dies_at) -> None:
                countdown = [dies_at]

                def step() -> None:
                    countdown[0] -= 1
                    if countdown[0] < 0:
                        os._exit(9)

                on_step(monkeypatch, step)
                asked(run, folder)
                os._exit(9)

            assert ended(fork(work)) == 9
            ends += 1
            left -= dies_at // STEPS * STEPS
        steps.clear()
        assert torch.equal(asked(run, folder).values, expected)
        assert len(steps) == left, "finished pieces are not swept again, others are"


def test_sweeps_that_are_killed_at_random_moments_go_on(
    run: hg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    expected, chance, found = asked(run, None).values, random.Random(2), set[int]()
    for attempt in range(12):
        folder = tmp_path / f"{attempt}"

        def work(folder: Path = folder) -> None:
            on_step(monkeypatch, lambda: time.sleep(0.002))
            asked(run, folder)
            time.sleep(9)

        child = fork(work)
        deadline = time.monotonic() + 20
        while not (folder / JOURNAL).exists() and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.15))
        assert kill(child) == -9
        found.add(len(list(folder.glob("pieces/*.safetensors"))))
        assert torch.equal(asked(run, folder).values, expected)
    assert len(found) > 2, found


def test_sweeps_that_die_at_any_single_moment_of_writing_go_on(
    run: hg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    expected, count = asked(run, None).values, 0
    for dies_at in range(100):
        folder = tmp_path / f"{dies_at}"

        def work(folder: Path = folder, dies_at: int = dies_at) -> None:
            Disk(monkeypatch, lambda moment: moment == dies_at, lambda: os._exit(9))
            asked(run, folder)

        if (status := ended(fork(work))) == 0:
            break
        assert status == 9
        count += 1
        for _ in range(2):  # also what went on behind half a line can be read
            assert torch.equal(asked(run, folder).values, expected)
    assert count > 20


def test_a_full_disk_keeps_the_pieces_that_are_finished(
    run: hg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None, steps: list[int]
) -> None:
    expected, count = asked(run, None).values, 0
    for fails_at in range(100):
        folder = tmp_path / f"{fails_at}"
        with monkeypatch.context() as patch:
            Disk(patch, lambda m, n=fails_at: m >= n, full)
            try:
                asked(run, folder)
            except hg.StoreError as error:
                assert "No space left" in str(error)  # noqa: PT017
            else:
                break
        count += 1
        kept = max(len((folder / JOURNAL).read_bytes().splitlines()) - 1 if (folder / JOURNAL).exists() else 0, 0)
        steps.clear()
        assert torch.equal(asked(run, folder).values, expected)
        assert len(steps) == (4 - kept) * STEPS
    assert count > 20


def test_one_process_at_a_time(run: hg.Run, tmp_path: Path, small_pieces: None, monkeypatch: Any) -> None:
    with monkeypatch.context() as patch:
        on_step(patch, lambda: asked(run, tmp_path / "pieces"))
        with pytest.raises(hg.StoreError, match=r"pieces is being swept into by another process.*Remedy: use another"):
            asked(run, tmp_path / "pieces")
    asked(run, tmp_path / "pieces")


def test_what_was_traced_before_does_not_change_a_bit(
    tmp_path: Path, small_pieces: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each epoch's short last batch comes often enough to be worth a graph, in one process or in each of two.

    A graph may round otherwise than what it was traced from. Here it does, and more than on any real machine.
    """
    real = TracedFunction._trace

    def rounding(self: Any, *args: Any) -> Any:
        graph, form = real(self, *args)
        return lambda *tensors: [x * (1 + 1e-5) for x in graph(*tensors)], form

    monkeypatch.setattr(TracedFunction, "_trace", rounding)
    problem = case("mlp_tanh", torch.float32)
    epochs = [[list(range(start, min(start + 5, N_TRAIN))) for start in (0, 5, 10)] for _ in range(22)]
    recorded(recipe_of(problem), tmp_path / "run", [[[ids] for ids in epoch] for epoch in epochs])
    queries = [*problem.queries, *problem.samples[:7]]

    def scores(folder: Path) -> Tensor:
        run = hg.load(tmp_path / "run", model=problem.build(), loss=problem.loss, data=problem.samples)
        return hg.attribute(run, queries, check=False, progress=False, resume=folder).values

    whole = scores(tmp_path / "pieces")
    lines = (tmp_path / "pieces" / JOURNAL).read_bytes().splitlines(keepends=True)
    for kept in (1, 3):
        (tmp_path / "pieces" / JOURNAL).write_bytes(b"".join(lines[:kept]))
        assert torch.equal(scores(tmp_path / "pieces"), whole)


# ---------------------------------------------------------------------------------------------------------------
# Another question


def measured(model: nn.Module, batch: Any) -> Tensor:
    return model(batch[0])[:, 0]


def changed(model: nn.Module, batch: Any) -> Tensor:
    return 1.01 * model(batch[0])[:, 0]


OTHERS: dict[str, dict[str, Any]] = {
    "method": {"method": "gauss-newton"},
    "measurement": {"measurement": measured},
    "by_epoch": {"by_epoch": True},
    "step": {"step": 5},
    "rows": {"train": [1, 2]},
    "rows (": {"groups": [0] * N_TRAIN},
    "aggregate": {"aggregate": "mean"},
    "block": {"block": 3},
    "compile": {"compile": False},
}


@pytest.fixture(scope="module")
def begun(run: hg.Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose first three pieces are finished."""
    folder = tmp_path_factory.mktemp("begun") / "pieces"
    real = attributing.plan_sweep
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attributing, "plan_sweep", lambda *a, again=None, **o: real(*a, again=again or FIXED, **o))
        asked(run, folder)
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    (folder / JOURNAL).write_bytes(b"".join(lines[:4]))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", OTHERS)
def test_another_question_is_refused_and_the_difference_named(name: str, run: hg.Run, begun: Path) -> None:
    before = contents(begun)
    with pytest.raises(hg.MismatchError, match=rf"begun with another question: {name.replace('(', '[(]')}.* differs"):
        asked(run, begun, **OTHERS[name])
    assert contents(begun) == before


def test_other_queries_and_another_run_are_refused(run: hg.Run, begun: Path, tmp_path: Path) -> None:
    moved = [*QUERIES[:-1], (QUERIES[-1][0] + 1e-7, QUERIES[-1][1])]
    for queries in (QUERIES[::-1], moved, QUERIES[:-1]):
        with pytest.raises(hg.MismatchError, match=r"another question: queries differs"):
            hg.attribute(run, queries, resume=begun)
    other = recorded(recipe_of(PROBLEM, hyper={"lr": 0.05}), tmp_path / "run")
    with pytest.raises(hg.MismatchError, match=r"another question: run differs"):
        asked(other, begun)
    copied = Path(shutil.copytree(run.trajectory.folder, tmp_path / "copy"))
    again = hg.load(copied, model=PROBLEM.build(), loss=PROBLEM.loss, data=PROBLEM.samples)
    asked(again, Path(shutil.copytree(begun, tmp_path / "pieces")))  # the same run in another place


def test_a_measurement_that_was_edited_under_its_name_is_refused(run: hg.Run, tmp_path: Path) -> None:
    asked(run, tmp_path / "pieces", measurement=measured)
    changed.__qualname__ = measured.__qualname__
    with pytest.raises(hg.MismatchError, match=r"another question: measured differs"):
        asked(run, tmp_path / "pieces", measurement=changed)


def test_measured_values_may_differ_by_rounding_only() -> None:
    here = torch.randn(50, dtype=torch.float64)
    assert _close(summary(here), summary(here.float()))
    swapped = here.clone()
    swapped[[3, 4]] = here[[4, 3]]
    assert not _close(summary(here), summary(swapped))
    assert not _close(summary(here), summary(here * 1.01))
    assert not _close(summary(here), None)


# ---------------------------------------------------------------------------------------------------------------
# Altered


def test_an_altered_piece_is_refused_by_name(run: hg.Run, begun: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    pieces = sorted(name for name in contents(begun) if name.startswith("pieces/"))[:3]
    for number in range(40):
        folder = Path(shutil.copytree(begun, tmp_path / f"{number}"))
        name = chance.choice(pieces)
        path, data = folder / name, bytearray((folder / name).read_bytes())
        way = number % 5
        if way == 0:
            path.unlink()
        elif way == 1:
            path.write_bytes(data[: chance.randrange(len(data))])
        elif way == 2:
            shutil.copy(folder / chance.choice([p for p in pieces if p != name]), path)
        elif way == 3:
            path.unlink()
            path.symlink_to(begun / name)
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        with pytest.raises(hg.StoreError, match=rf"{name} (is missing|has the wrong|was altered|lies outside)"):
            asked(run, folder)
        assert not (folder / "sweep.lock").exists()


def test_an_altered_journal_is_refused(run: hg.Run, begun: Path, tmp_path: Path) -> None:
    chance, data = random.Random(0), (begun / JOURNAL).read_bytes()
    folder = Path(shutil.copytree(begun, tmp_path / "pieces"))
    for _ in range(60):
        place = chance.randrange(len(data))
        (folder / JOURNAL).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(hg.StoreError, match=r"sweep\.jsonl"):
            asked(run, folder)


@pytest.mark.parametrize(
    "altered",
    [
        {"format": 9}, {"plan": None}, {"plan": {"engine": "plain:x"}}, {"question": 3},
        {"plan": {**vars(FIXED), "block": 0}},
        {"plan": {**vars(FIXED), "carried": "3"}}, {"plan": {**vars(FIXED), "engine": "os.system"}},
    ],
)  # fmt: skip
def test_a_forged_plan_is_refused(altered: dict[str, Any], run: hg.Run, begun: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "pieces"))
    first = loads((folder / JOURNAL).read_bytes().splitlines()[0])
    entry = {key: value for key, value in {**first, **altered}.items() if key not in ("previous", "seal")}
    (folder / JOURNAL).write_bytes(sealed(entry, _BEFORE))
    with pytest.raises(hg.HydragradError, match=r"sweep\.jsonl cannot be read|no engine 'os\.system'"):
        asked(run, folder)


def test_a_forged_piece_is_refused_or_has_its_shape(run: hg.Run, begun: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "pieces"))
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    entry = {key: value for key, value in loads(lines[1]).items() if key not in ("previous", "seal")}
    other = {key: value for key, value in loads(lines[2]).items() if key not in ("previous", "seal")}
    for piece, about in (
        (entry["piece"], {**entry["about"], "columns": [0, 2]}),
        (other["piece"], entry["about"]),
        (None, entry["about"]),
        (entry["piece"], {"columns": [0, 3]}),
        ({**entry["piece"], "name": "../pieces/00000000.safetensors"}, entry["about"]),
        (entry["piece"], {**entry["about"], "growth": "x"}),
    ):
        (folder / JOURNAL).write_bytes(lines[0] + sealed({"piece": piece, "about": about}, sha256(lines[0])))
        try:
            scores = asked(run, folder)
        except hg.StoreError as error:
            assert "sweep.jsonl" in str(error) or "pieces/" in str(error)  # noqa: PT017
        else:  # columns that no plan has: not taken
            assert about["columns"] == [0, 2]
            assert torch.equal(scores.values, asked(run, begun).values)


# ---------------------------------------------------------------------------------------------------------------
# The plan


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
