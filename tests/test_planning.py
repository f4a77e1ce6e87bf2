"""The plan: what fits in the budget, what is said of it, and that neither the answer nor real memory goes astray."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import hydragrad as hg
from hydragrad.hypergradient import exact
from hydragrad.hypergradient.choosing import Chosen, Sizes
from hydragrad.hypergradient.points import points_of
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.planning import plan_sweep
from hydragrad.trajectory.moments import forwards
from tests.hypergradient.recorded import STEPS, recipe_of, recorded, values
from tests.tolerances import SAME, assert_close
from tests.zoo import N_QUERY, N_TRAIN, case

PROBLEM = case("mlp_tanh")
METHODS = ["exact", "gauss-newton", "hessian-free"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(recipe_of(PROBLEM), tmp_path_factory.mktemp("planning") / "run")


@pytest.fixture(scope="module")
def sweep(run):
    return Sweep.of(run)


@pytest.fixture(scope="module")
def point(sweep):
    moment = next(forwards(sweep.replayer, sweep.run.trajectory, 1))
    return next(points_of(moment, sweep.objective))[2]


# Bytes as of a model of 1e6 float32 parameters under SGD with momentum, and of a tiny model with many examples.
LARGE = Sizes(number=4, adjoint=8_000_000, state=12_000_000, engine=10_000_000, longest=100)
TINY = Sizes(number=4, adjoint=1_000, state=1_500, engine=2_000, longest=50)


@pytest.fixture
def planned(sweep, point, monkeypatch):
    """Plans from given sizes: what is measured differs from run to run, the arithmetic does not."""

    def make(sizes: Sizes, queries: int, memory: int, rows: int = N_TRAIN, block: int = 16) -> hg.Plan:
        def chosen(*_: Any, **__: Any) -> Chosen:
            return Chosen(
                exact.ReverseOverReverse(sweep.objective), min(block, queries), 1e-3, 2e-3, sizes, (), point, 0.0
            )

        monkeypatch.setattr("hydragrad.planning.choose", chosen)
        return plan_sweep(sweep, queries, "exact", rows=rows, memory=memory, block=None, compile=False)

    return make


def smallest(sizes: Sizes, queries: int, rows: int) -> int:
    """Bytes of the result, then one query at a time with two states kept: nothing needs less."""
    return rows * queries * sizes.number + sizes.engine + 2 * sizes.state + sizes.adjoint + rows * sizes.number


WORK = list(itertools.product([LARGE, TINY], [1, 7, 100], [12, 5000], [1, 16]))


@pytest.mark.parametrize(("sizes", "queries", "rows", "block"), WORK)
def test_a_plan_covers_the_queries_within_the_budget(planned, sizes, queries, rows, block):
    least = smallest(sizes, queries, rows)
    for memory in [1, least // 2, least - 1, least, *(int(least * 1.3**k) for k in range(1, 25))]:
        plan = planned(sizes, queries, memory, rows, block)
        assert plan.budget == memory
        assert 1 <= plan.block <= plan.carried <= queries
        assert 2 <= plan.segment <= sizes.longest
        assert (plan.sweeps - 1) * plan.carried < queries <= plan.sweeps * plan.carried
        too_small = [reason for reason in plan.reasons if "budget" in reason and "smallest" in reason]
        if memory < least:
            assert plan.peak_bytes > memory
            assert too_small
        else:
            assert plan.peak_bytes <= memory, (memory / least, plan)
            assert not too_small


@pytest.mark.parametrize(("sizes", "queries", "rows", "block"), WORK)
def test_less_memory_means_more_sweeps_or_shorter_segments(planned, sizes, queries, rows, block):
    """By factors of four: a smaller difference may go to the segment at the expense of the queries, or back."""
    full = queries * (sizes.adjoint + rows * sizes.number * 2) + 16 * sizes.engine + sizes.longest * sizes.state * 5
    plans = [planned(sizes, queries, max(full // 4**k, 1), rows, block) for k in range(12)]
    for more, less in itertools.pairwise(plans):
        assert less.peak_bytes <= more.peak_bytes
        assert less.sweeps >= more.sweeps
        assert less.segment <= more.segment
        assert less.seconds >= more.seconds
    assert (plans[0].sweeps, plans[0].segment) == (1, sizes.longest)
    assert (plans[-1].sweeps, plans[-1].segment) == (queries, 2)
    assert plans[-1].peak_bytes == smallest(sizes, queries, rows)


def test_peak_and_seconds_by_hand(planned):
    plan = planned(LARGE, 40, 1_000_000_000, rows=1000)
    # left of 1e9 are 1e9 - 16e4 (result) - 16e7 (engine); a quarter of it holds 17 states; the rest 78 adjoints
    assert (plan.segment, plan.sweeps, plan.carried, plan.block) == (17, 1, 40, 16)
    assert plan.peak_bytes == 160_000 + 160_000_000 + 17 * 12_000_000 + 40 * 8_004_000
    assert plan.seconds == pytest.approx(len(STEPS) * (2 * 2e-3 + 40 * 1e-3))  # segments: every step replayed twice
    whole = planned(LARGE, 40, 100_000_000_000, rows=1000)
    assert whole.seconds == pytest.approx(len(STEPS) * (2e-3 + 40 * 1e-3))


@pytest.mark.parametrize("method", METHODS)
def test_of_a_number_and_of_the_queries(run, method):
    for queries in (N_QUERY, PROBLEM.queries):
        plan = hg.plan(run, queries, method)
        assert (plan.method, plan.queries, plan.sweeps, plan.carried) == (method, N_QUERY, 1, N_QUERY)
        assert plan.budget > 2**20  # half of what is free
        assert plan.peak_bytes < 2**20
        assert plan.seconds > 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block", [1, 3, 8])
def test_a_given_block_is_respected(run, block, method):
    assert hg.plan(run, 8, method, block=block).block == block
    assert hg.plan(run, 5, method, block=block).block == min(block, 5)
    assert hg.plan(run, 8, method, block=block, memory=1).block == 1  # no room for a second adjoint


def test_words(run):
    plan = hg.plan(run, 8, block=2, memory=1)
    text = str(plan)
    parts = ("exact", "8 queries", plan.engine, "1 at a time", "8 sweep(s)", "2 states", "MiB", " s;", *plan.reasons)
    assert [part for part in parts if part not in text] == []
    assert re.search(r"about \d+ MiB, \d+\.\d s", text)
    assert "engine" in plan.engine
    assert "budget of 0.0 MiB" in text
    assert "budget" not in str(hg.plan(run, 8))


BAD = [
    ({"queries": 0}, "queries"),
    ({"queries": []}, "queries"),
    ({"memory": 0}, "memory"),
    ({"block": 0}, "block"),
    ({"block": -1}, "block"),
    ({"method": "newton"}, "exact, gauss-newton, hessian-free.*newton"),
    ({"step": 0}, rf"step=1 to {len(STEPS)}.*step=0"),
    ({"step": len(STEPS) + 1}, rf"step=1 to {len(STEPS)}.*step={len(STEPS) + 1}"),
]


@pytest.mark.parametrize(("bad", "words"), BAD, ids=[str(bad) for bad, _ in BAD])
def test_bad_arguments_are_refused(run, bad, words):
    with pytest.raises(hg.HydragradError, match=words) as refused:
        hg.plan(run, **{"queries": 3, **bad})
    assert "Expected: " in str(refused.value)
    assert "Got: " in str(refused.value)


@pytest.mark.parametrize("method", METHODS)
def test_scores_are_the_same_for_every_plan(run, method):
    plain = values(run, PROBLEM.queries, method)
    need = hg.plan(run, N_QUERY, method, block=1).peak_bytes
    plans = set()
    for memory, block in itertools.product([1, need // 3, need // 2, need, 10 * need], [1, 3, None]):
        scores = hg.attribute(run, PROBLEM.queries, method=method, memory=memory, block=block, check=False)
        assert_close(scores.values, plain, SAME)
        found = re.search(r"(\d+) at a time, (\d+) sweep\(s\) of (\d+), (\d+) states", scores.diagnostics.plan)
        assert found is not None
        plans.add(found.groups())
    assert len(plans) >= 3, plans  # they were different plans indeed


BUDGET = 200_000_000
PARAMETERS = 989_002
PEAK = f"""
import sys
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
import hydragrad as hg

torch.set_num_threads(1)
torch.manual_seed(0)
folder, memory = sys.argv[1], int(sys.argv[2]) or None

def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1], reduction="none")

def recorded(name, wide, middle, narrow):
    model = nn.Sequential(
        nn.Linear(wide, middle), nn.Tanh(), nn.Linear(middle, narrow), nn.Tanh(), nn.Linear(narrow, 10))
    data = TensorDataset(torch.randn(48, wide), torch.randint(10, (48,)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    with hg.record(f"{{folder}}/{{name}}", model, optimizer, checkpoint_every=4) as recording:
        for batch in recording.batches(DataLoader(data, 8)):
            optimizer.zero_grad()
            loss(model, batch).mean().backward()
            optimizer.step()
    run = hg.load(f"{{folder}}/{{name}}", model=model, loss=loss, data=data)
    return run, sum(p.numel() for p in model.parameters())

def attribute(run, wide, **more):
    queries = [(torch.randn(wide), torch.tensor(j % 10)) for j in range(32)]
    return hg.attribute(run, queries, check=False, progress=False, compile=False, **more)

def bytes_of(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))

attribute(recorded("small", 8, 10, 10)[0], 8)  # what torch imports when it is first used is not a sweep's memory
run, parameters = recorded("large", 512, 1024, 448)
assert parameters == {PARAMETERS}
run.replay()
open("/proc/self/clear_refs", "w").write("5")  # the peak (ru_maxrss) counts from here
before = bytes_of("VmRSS")
attribute(run, 512, memory=memory)
print(bytes_of("VmHWM") - before)
"""


def measured_peak(folder: Path, memory: int) -> int:
    """Bytes by which the peak of a process rose while it attributed 32 queries to a run of 1e6 parameters."""
    folder.mkdir()
    source = str(Path(hg.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", PEAK, str(folder), str(memory)],
        env={**os.environ, "PYTHONPATH": source, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak is read from Linux's /proc")
def test_the_peak_of_a_real_sweep_keeps_to_the_budget(tmp_path):
    """32 adjoints of 8 MB and the engine's work need 500 MB; the budget is 200.

    Allowed above it: a quarter, for what malloc keeps in pieces, and training's own share, which a sweep replays once
    more: parameters, gradients, momentum, and the copies of the model for the objective and for the queries.
    """
    allowed = BUDGET * 1.25 + 6 * 4 * PARAMETERS
    free = measured_peak(tmp_path / "free", 0)
    assert free > 1.5 * allowed, f"{free / 1e6:.0f} MB without a budget: this run is too small to show anything"
    kept = measured_peak(tmp_path / "kept", BUDGET)
    assert kept <= allowed, f"{kept / 1e6:.0f} MB under a budget of {BUDGET / 1e6:.0f} MB"
    assert torch.get_default_dtype() == torch.float32  # float32 in the child too: 4 bytes a parameter
