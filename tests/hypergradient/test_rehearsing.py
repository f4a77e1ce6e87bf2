"""Predicted seconds against a machine whose every part takes a known time: no real clock decides."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import hydragrad as hg
from hydragrad import attributing, planning
from hydragrad.hypergradient import choosing, clock, rehearsing
from hydragrad.hypergradient.exact import ReverseOverReverse
from hydragrad.hypergradient.hessian_free import Jvp
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.step.optimizer_map import OptimizerMap
from hydragrad.trajectory.replay import Replayer
from hydragrad.trajectory.spilling import Spill
from hydragrad.trajectory.store import Trajectory
from tests.hypergradient.classifying import losses, train

ADVANCE, CAPTURE, LOAD, STEP, QUERY = 3.0, 2.0, 50.0, 2.0, 0.5
STEPS, EVERY, QUERIES, BLOCK = 200, 40, 12, 3
ENGINES = {"exact": "plain:reverse-over-reverse", "hessian-free": "plain:jvp"}


class Machine:
    """Its parts take their seconds of an imagined clock; while it is ``busy``, every fifth takes twenty times that."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.busy, self._patch = 0.0, False, patch
        self._random = random.Random(0)
        self._takes(Replayer, "advance", lambda *_: ADVANCE)
        self._takes(Replayer, "state", lambda *_: CAPTURE)
        self._takes(OptimizerMap, "linearize", lambda *_: STEP)
        for engine in (ReverseOverReverse, Jvp):
            self._takes(engine, "products", lambda _, point, gam, *__: QUERY * len(gam[0]))
        for owner, name in ((Trajectory, "state"), (Spill, "write"), (Spill, "take")):
            self._takes(owner, name, lambda *_: LOAD)
        patch.setattr(rehearsing, "quiet_seconds", lambda: self.now)

    def _takes(self, owner: Any, name: str, seconds: Callable[..., float]) -> None:
        plain = getattr(owner, name)

        def timed(*args: Any, **given: Any) -> Any:
            slower = self._random.choice([1.0, 1.0, 1.0, 1.0, 20.0]) if self.busy and name != "linearize" else 1.0
            self.now += slower * seconds(*args)
            return plain(*args, **given)

        self._patch.setattr(owner, name, timed)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module, TensorDataset]:
    torch.manual_seed(0)
    model, data = nn.Linear(20, 10), TensorDataset(torch.rand(40, 20), torch.randint(0, 10, (40,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    folder = tmp_path_factory.mktemp("rehearsing") / "run"
    train(folder, model, optimizer, data, 4, STEPS, EVERY)
    return folder, model, data


def planned(
    stored: tuple[Path, nn.Module, TensorDataset], method: str, monkeypatch: pytest.MonkeyPatch, **budgets: Any
) -> tuple[hg.Run, Any, Any]:
    """A plan with a given engine, made anew."""

    def choose(sweep: Sweep, *_: Any, **__: Any) -> choosing.Chosen:
        return choosing.fixed(sweep, method, ENGINES[method], BLOCK)

    monkeypatch.setattr(planning, "choose", choose)
    folder, model, data = stored
    run = hg.load(folder, model=model, loss=losses, data=data)
    queries = [data[j] for j in range(QUERIES)]
    return run, queries, hg.plan(run, queries, method, **budgets)


@pytest.mark.parametrize("busy", [False, True])
@pytest.mark.parametrize("method", ENGINES)
def test_every_part_costs_what_it_takes_on_a_quiet_machine(machine, stored, monkeypatch, method, busy) -> None:
    machine.busy = busy
    monkeypatch.setattr(rehearsing, "SHARE", 100.0)  # as often as in a long sweep
    run, _, _ = planned(stored, method, monkeypatch, memory="1 GB")
    costs = next(value for key, value in run.memo.items() if key[0] == "rehearsed")
    assert (costs.advance, costs.capture) == (ADVANCE, CAPTURE)
    assert costs.query == pytest.approx(QUERY)
    assert costs.step == pytest.approx(STEP)
    assert costs.load == (LOAD if not busy else costs.load)  # a state is read once


@pytest.mark.parametrize("budgets", [{"memory": "1 GB"}, {"memory": "250 kB"}, {"memory": "250 kB", "disk": "1 MB"}])
@pytest.mark.parametrize("method", ENGINES)
def test_a_sweep_takes_the_seconds_that_were_predicted(machine, stored, monkeypatch, method, budgets) -> None:
    run, queries, plan = planned(stored, method, monkeypatch, **budgets)
    spent = []

    def swept(*args: Any, **given: Any) -> Any:
        began = machine.now
        found = sweep(*args, **given)
        spent.append(machine.now - began)
        return found

    sweep = attributing._sweep
    monkeypatch.setattr(attributing, "_sweep", swept)
    hg.attribute(run, queries, method=method, check=False, progress=False, **budgets)
    assert spent == [pytest.approx(plan.seconds, rel=0.04)]
    assert ("memory" not in budgets or budgets["memory"] == "1 GB") or plan.replays > 1.2


def test_the_clock_stands_while_a_processor_is_waited_for(monkeypatch, tmp_path) -> None:
    told = tmp_path / "schedstat"
    monkeypatch.setattr(clock, "SCHEDSTAT", str(told))
    monkeypatch.setattr(clock.time, "perf_counter", lambda: 100.0)
    assert clock.quiet_seconds() == 100.0  # a system that does not tell
    told.write_text("5000000000 1500000000 12\n")
    assert clock.quiet_seconds() == 98.5
    told.write_text("nothing\n")
    assert clock.quiet_seconds() == 100.0


def test_a_clock_whose_processor_is_taken_away_while_it_reads_does_not_run_backwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[float] = []
    monkeypatch.setattr(clock.time, "perf_counter", lambda: told.append(100.0 + 0.5 * len(told)) or told[-1])
    monkeypatch.setattr(clock, "_waited", lambda: 1.5 if told else 1.0)  # half a second right after the first reading
    assert clock.quiet_seconds() == 99.0


def test_laps_that_the_clock_corrects_below_nothing_are_no_gain() -> None:
    assert rehearsing._typical([-3.0, -1.0, 2.0]) == 0.0
    assert rehearsing._typical([1.0, 3.0, -1.0]) == 1.0
