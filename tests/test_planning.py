"""The plan: what fits in the budget, what is said of it, and that neither the answer nor real memory goes astray."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hydragrad as hg
from tests.hypergradient.recorded import STEPS, least_memory, recipe_of, recorded, values
from tests.tolerances import SAME, assert_close
from tests.zoo import N_QUERY, case

PROBLEM = case("mlp_tanh")
METHODS = ["exact", "gauss-newton", "hessian-free"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return recorded(recipe_of(PROBLEM), tmp_path_factory.mktemp("planning") / "run")


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
    assert hg.plan(run, 8, method, block=block, memory=least_memory(run, 8, method)).block == 1


@pytest.mark.parametrize("method", METHODS)
def test_the_memory_that_a_refusal_asks_for_is_enough(run, method):
    least = least_memory(run, 8, method)
    plan = hg.plan(run, 8, method, memory=least, block=1)
    assert plan.peak_bytes <= least
    assert (plan.carried, plan.segment) == (1, 2)
    with pytest.raises(hg.HydragradError, match="too small"):
        hg.plan(run, 8, method, memory=least // 2, block=1)


def test_words_for_amounts(run):
    assert hg.plan(run, 3, memory="1 GB").budget == 10**9
    assert hg.plan(run, 3, memory="1 GiB").budget == 2**30
    assert hg.plan(run, 3, memory="1.5 mb").budget == 1_500_000


def test_words(run):
    least = least_memory(run, 8, "exact")
    plan = hg.plan(run, 8, block=2, memory=least)
    text = str(plan)
    parts = (
        "exact",
        "8 queries",
        plan.engine,
        "1 at a time",
        "8 sweep(s)",
        "2 states",
        "MiB",
        "replays",
        *plan.reasons,
    )
    assert [part for part in parts if part not in text] == []
    assert re.search(r"about \d+ MiB, \d+\.\d s", text)
    assert "engine" in plan.engine
    assert f"{plan.replays:.2f} replays" in text
    assert plan.replays > 8
    assert "no step is taken more than" in text
    assert "too little memory" not in str(hg.plan(run, 8))


BAD = [
    ({"queries": 0}, "queries"),
    ({"queries": []}, "queries"),
    ({"memory": 0}, "memory"),
    ({"memory": "much"}, "memory.*2 GB"),
    ({"disk": 0}, "disk"),
    ({"disk": "1 G"}, "disk"),
    ({"replays": 0.5}, "replays"),
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
    need, least = hg.plan(run, N_QUERY, method, block=1).peak_bytes, least_memory(run, N_QUERY, method)
    plans = set()
    for memory, block in itertools.product([least, (least + need) // 2, need, 10 * need], [1, 3, None]):
        given = {"memory": memory, "block": block, "disk": "1 MB" if block == 3 else None}
        scores = hg.attribute(run, PROBLEM.queries, method=method, check=False, **given)
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
        timeout=600,
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
