"""Schedules of a backward pass: hardly more repeated steps than the least, and exactly as many as predicted."""

import functools
import math
import os
import time
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import hydragrad as hg
from hydragrad import planning
from hydragrad.errors import StoreError
from hydragrad.hypergradient import choosing
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.run import Run
from hydragrad.trajectory.moments import Backwards
from hydragrad.trajectory.schedule import Schedule, cut, reach, taken, times
from hydragrad.trajectory.spilling import FOLDER, Spill
from hydragrad.trajectory.state import State
from tests.children import ended, fork
from tests.trajectory.loops import assert_same_params, bind, make_data, record_run

STEPS = 60
SCHEDULES = [(2, 0), (3, 0), (4, 0), (7, 0), (15, 0), (1000, 0), (2, 1), (3, 4), (5, 2), (4, 1000)]


@functools.cache
def least(length: int, slots: int) -> float:
    """By dynamic programming over every cut: nothing needs fewer steps."""
    if length <= slots:
        return length
    if slots < 2:
        return math.inf
    return min(k + least(length - k, slots - 1) + least(k, slots) for k in range(1, length))


@pytest.mark.parametrize("slots", [2, 3, 4, 5, 8, 13, 20])
def test_hardly_more_steps_than_the_least_possible(slots: int) -> None:
    found = [(taken(n, slots), least(n, slots)) for n in range(1, 101)]
    assert all(best <= steps <= 1.025 * best for steps, best in found)
    assert sum(steps == best for steps, best in found) > 50


@pytest.mark.parametrize("slots", [2, 3, 5, 9])
def test_binomial_numbers(slots: int) -> None:
    for r in range(1, 7):
        full = reach(slots, r)
        assert times(full, slots) == r
        assert times(full + 1, slots) == r + 1
        assert taken(full, slots) == least(full, slots) if full < 100 else taken(full, slots) < r * full


def test_long_stretches_are_counted_at_once() -> None:
    began = time.process_time()
    for slots in (2, 3, 10, 100, 5000, 20_000, 30_000):
        assert 20_000 <= taken(20_000, slots) <= times(20_000, slots) * 20_000
    assert taken(20_000, 20_000) == 20_000
    assert taken(20_000, 2) == 20_000 * 20_001 // 2 - 1
    assert taken(20_000, 200) < 2 * 20_000  # C(201, 2) = 20100
    assert Schedule(20, 249).replayed(20_000) < 3 * 20_000
    assert time.process_time() - began < 5


def test_cuts_leave_two_parts_that_can_be_revisited() -> None:
    for slots in range(2, 12):
        for length in range(slots + 1, 200):
            first, r = cut(length, slots), times(length, slots)
            assert 1 <= first < length
            assert first <= reach(slots, r - 1)
            assert length - first <= reach(slots - 1, r)


def test_pieces_make_up_the_stretch() -> None:
    for slots, on_disk, length in [(2, 3, 50), (5, 100, 50), (60, 3, 50), (7, 1, 8), (3, 2, 10)]:
        pieces = Schedule(slots, on_disk).pieces(length)
        assert sum(pieces) == length
        assert min(pieces) >= 1
        assert max(pieces) - min(pieces) <= 1
        assert len(pieces) <= on_disk + 2
    assert Schedule(60, 3).pieces(50) == [50]
    assert Schedule(25, 3).pieces(50) == [50]  # in memory this takes no more steps


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Run]:
    """The same training with one stretch, or six."""
    folder = tmp_path_factory.mktemp("schedule")
    for spacing in (10, 1000):
        record_run(folder / str(spacing), epochs=12, checkpoint_every=spacing)
    return {spacing: bind(folder / str(spacing)) for spacing in (10, 1000)}


def alive_states(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[State]]:
    made: list[weakref.ref[State]] = []
    original = State.__init__

    def init(self: State, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        made.append(weakref.ref(self))

    monkeypatch.setattr(State, "__init__", init)
    return made


@pytest.mark.parametrize(("slots", "on_disk"), SCHEDULES)
@pytest.mark.parametrize("spacing", [10, 1000])
def test_every_step_once_backwards_with_the_states_and_steps_that_were_predicted(
    runs: dict[int, Run], spacing: int, slots: int, on_disk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, made = runs[spacing], alive_states(monkeypatch)
    swept = Backwards(run.replayer(), run.trajectory, STEPS, slots, on_disk)
    spilled = run.trajectory.folder / FOLDER
    seen, kept, written, moment = list[int](), 0, 0, None
    for moment in swept:
        seen.append(moment.record.index)
        kept = max(kept, sum(ref() is not None for ref in made))
        written = max(written, len(list(spilled.glob("*/states/*"))))
    assert seen == list(reversed(range(STEPS)))
    assert swept.drift == dict.fromkeys(range(spacing, STEPS + 1, spacing), 0.0) | {STEPS: 0.0}
    lengths = [min(spacing, STEPS)] * max(STEPS // spacing, 1)
    assert swept.replayed == sum(Schedule(slots, on_disk).replayed(length) for length in lengths)
    assert kept <= slots + 1  # and the moment before, which whoever iterates still holds
    assert written <= on_disk
    assert written == Schedule(slots, on_disk).written(lengths[0])
    assert not spilled.exists()
    assert moment is not None


ENGINES = {"exact": "reverse-over-reverse", "gauss-newton": "jvp-then-vjp", "hessian-free": "jvp"}


@pytest.mark.parametrize("method", ENGINES)
def test_scores_do_not_depend_on_the_schedule(
    runs: dict[int, Run], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit; by one engine, for the clock decides which is used, and what it traced before."""
    run, queries = runs[1000], [make_data()[j] for j in range(4)]

    def choose(sweep: Sweep, *_: Any, **__: Any) -> Any:
        return choosing.fixed(sweep, method, f"plain:{ENGINES[method]}", 2)

    monkeypatch.setattr(planning, "choose", choose)
    given: dict[str, Any] = {"method": method, "block": 2, "compile": False, "check": False}
    whole = hg.attribute(run, queries, **given).values
    original = Backwards.__init__
    for slots, on_disk in SCHEDULES:

        def init(self: Backwards, *args: Any, linear: bool, slots: int = slots, on_disk: int = on_disk) -> None:
            replayer, trajectory, stop, *_ = args
            original(self, replayer, trajectory, stop, slots, on_disk, linear=linear)

        monkeypatch.setattr(Backwards, "__init__", init)
        assert torch.equal(hg.attribute(run, queries, **given).values, whole), (slots, on_disk)


def one_state(run: Run) -> State:
    return run.trajectory.state(0)


def test_a_killed_sweep_leaves_states_that_the_next_one_removes(runs: dict[int, Run]) -> None:
    run = runs[1000]
    folder = run.trajectory.folder / FOLDER

    def work() -> None:
        for moment in Backwards(run.replayer(), run.trajectory, STEPS, 3, 4):
            if moment.record.index == 50:
                os._exit(9)

    assert ended(fork(work)) == 9
    (left,) = folder.iterdir()
    assert len(list(left.glob("states/*"))) == 4
    assert hg.load(run.trajectory.folder, model=run.problem.model, loss=run.problem.loss, data=run.problem.data)
    with Spill(run.trajectory.folder) as alive:
        assert [*folder.iterdir()] == [alive.folder]
        with Spill(run.trajectory.folder):
            assert len(list(folder.iterdir())) == 2  # a living sweep's states stay
        assert [*folder.iterdir()] == [alive.folder]
    assert not folder.exists()


def test_a_folder_without_a_lock_is_removed_once_it_is_old(tmp_path: Path) -> None:
    made = tmp_path / FOLDER / "1-abc"
    made.mkdir(parents=True)
    with Spill(tmp_path):
        assert made.exists()  # its lock may be about to be made
    os.utime(made, (1, 1))
    with Spill(tmp_path):
        assert not made.exists()


def test_states_that_are_broken_off_leave_nothing(runs: dict[int, Run]) -> None:
    run = runs[1000]

    def interrupted() -> None:
        for moment in Backwards(run.replayer(), run.trajectory, STEPS, 3, 4):
            if moment.record.index == 50:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not (run.trajectory.folder / FOLDER).exists()


def test_an_altered_state_is_refused(runs: dict[int, Run], tmp_path: Path) -> None:
    state = one_state(runs[1000])
    with Spill(tmp_path) as spill:
        spill.write(state)
        assert_same_params(spill.take(0).params, state.params)
        spill.write(state)
        (file,) = spill.folder.glob("states/*")
        file.write_bytes(file.read_bytes()[:-1] + b"x")
        with pytest.raises(StoreError, match="was altered"):
            spill.take(0)
