"""The search remembers: what was measured on a run is not measured again, and does not pass to other shapes."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import hydragrad as hg
from hydragrad.hypergradient import searching
from hydragrad.hypergradient.choosing import choose
from hydragrad.hypergradient.costs import products
from hydragrad.hypergradient.curvature import Engine
from hydragrad.hypergradient.engines import reference
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.hypergradient.tracing import Traced
from tests.hypergradient.recorded import recipe_of, recorded
from tests.zoo import case


@pytest.fixture
def run(tmp_path, monkeypatch) -> hg.Run:
    for share in ("_SHARE", "_FIRST_SHARE"):
        monkeypatch.setattr(searching, share, 1e9)
    return recorded(recipe_of(case("mlp_tanh")), tmp_path / "run")


@pytest.mark.parametrize("method", ["exact", "gauss-newton", "hessian-free"])
def test_a_second_search_measures_nothing(run, method, monkeypatch):
    first = choose(Sweep.of(run), 40, method, memory=2**34, block=None, compile=False)

    def measured(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(searching, "products", measured)
    second = choose(Sweep.of(run), 40, method, memory=2**34, block=None, compile=False)
    assert (repr(second.engine), second.block, second.per_query) == (
        repr(first.engine),
        first.block,
        first.per_query,
    )


def test_the_fastest_of_what_is_known_is_chosen(run, monkeypatch):
    monkeypatch.setattr(searching, "_TRACING_GAIN", 1e9)
    choose(Sweep.of(run), 40, "exact", memory=2**34, block=None, compile=False)
    (memo,) = [kept for key, kept in run.memo.items() if key[:2] == ("measured", "exact")]
    names = sorted({name for name, _ in memo["seconds"]})
    for wanted in [name for name in names if "double" not in name]:
        for name, size in memo["seconds"]:
            memo["seconds"][name, size] = size * (1e-6 if name == wanted else 1.0)
        chosen = choose(Sweep.of(run), 40, "exact", memory=2**34, block=None, compile=False)
        assert repr(chosen.engine) == wanted


def test_every_size_is_measured_traced(run, monkeypatch):
    untraced: list[object] = []
    monkeypatch.setattr(searching, "_TRACING_GAIN", 1e9)
    monkeypatch.setattr(searching, "products", lambda engine, *at: made(engine, *at))

    def made(engine: Engine, *at: Any) -> Any:
        """Products whose traced engines note what runs in Python."""
        if not isinstance(engine, Traced):
            return products(engine, *at)
        plain = engine.function.function
        engine.function.function = lambda *inputs: (untraced.append(engine), plain(*inputs))[1]
        try:
            return products(engine, *at)
        finally:
            engine.function.function = plain

    choose(Sweep.of(run), 40, "exact", memory=2**34, block=None, compile=False)
    (memo,) = [kept for key, kept in run.memo.items() if key[:2] == ("measured", "exact")]
    assert len({size for name, size in memo["seconds"] if "traced" in name}) > 1
    assert not untraced


@pytest.mark.parametrize(("seconds", "worth"), [(1e-6, False), (1.0, True)])
def test_tracing_begins_where_it_saves_more_than_it_takes(run, seconds, worth):
    sweep = Sweep.of(run)
    choose(sweep, 40, "exact", memory=2**34, block=None, compile=False)
    (memo,) = [kept for key, kept in run.memo.items() if key[:2] == ("measured", "exact")]
    (plain,) = [key for key in memo["seconds"] if key[0] == repr(reference("exact", sweep.objective))]
    memo["seconds"] = {plain: seconds}
    for graphs in [kept for key, kept in run.memo.items() if key[0] == "graphs"]:
        graphs.clear()
    choose(Sweep.of(run), 40, "exact", memory=2**34, block=None, compile=False)
    assert any("traced" in name for name, _ in memo["seconds"]) is worth


def test_a_fixed_block_is_kept(run):
    chosen = choose(Sweep.of(run), 40, "exact", memory=2**34, block=7, compile=False)
    assert chosen.block == 7


def test_blocks_are_balanced_and_within_memory(run):
    sizes = choose(Sweep.of(run), 40, "exact", memory=2**34, block=None, compile=False).sizes
    narrow = choose(Sweep.of(run), 40, "exact", memory=6 * sizes.engine, block=None, compile=False)
    assert 1 <= narrow.block <= 3


def test_graphs_do_not_pass_to_another_objective(tmp_path, monkeypatch):
    """A layer that thaws midway: a sweep to an earlier step differentiates fewer parameters than one to the end."""
    for share in ("_SHARE", "_FIRST_SHARE"):
        monkeypatch.setattr(searching, share, 1e9)
    monkeypatch.setattr(searching, "_TRACING_GAIN", 1e9)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    data = TensorDataset(torch.randn(12, 4, dtype=torch.float64), torch.randint(0, 3, (12,)))

    def loss(model: nn.Module, batch: list[torch.Tensor]) -> torch.Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with hg.record(tmp_path / "run", model, optimizer) as recording:
        for epoch in range(2):
            model[0].requires_grad_(bool(epoch))
            for batch in recording.batches(DataLoader(data, batch_size=4)):
                optimizer.zero_grad()
                loss(model, batch).mean().backward()
                optimizer.step()
    run = hg.load(tmp_path / "run", model=model, loss=loss, data=data)
    early = choose(Sweep.of(run, 3), 8, "exact", memory=2**34, block=None, compile=False)
    late = choose(Sweep.of(run), 8, "exact", memory=2**34, block=None, compile=False)
    assert len(early.point.params) < len(late.point.params)
    assert "traced" in repr(early.engine)
    assert "traced" in repr(late.engine)
    assert not late.reasons
    scores = hg.attribute(run, data, progress=False)
    assert scores.diagnostics.gradient_gap is not None
    assert scores.diagnostics.gradient_gap < 1e-12
    assert scores.diagnostics.ladder[0].error < 0.02  # really retrained
