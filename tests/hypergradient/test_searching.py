"""The search remembers: what was measured on a run is not measured again, and does not pass to other shapes."""

import pytest

import hydragrad as hg
from hydragrad.hypergradient import searching
from hydragrad.hypergradient.choosing import choose
from hydragrad.hypergradient.sweeping import Sweep
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


def test_the_fastest_of_what_is_known_is_chosen(run):
    choose(Sweep.of(run), 40, "exact", memory=2**34, block=None, compile=False)
    (memo,) = [kept for key, kept in run.memo.items() if key[:2] == ("measured", "exact")]
    names = sorted({name for name, _ in memo["seconds"]})
    for wanted in [name for name in names if "double" not in name]:
        for name, size in memo["seconds"]:
            memo["seconds"][name, size] = size * (1e-6 if name == wanted else 1.0)
        chosen = choose(Sweep.of(run), 40, "exact", memory=2**34, block=None, compile=False)
        assert repr(chosen.engine) == wanted


def test_a_fixed_block_is_kept(run):
    chosen = choose(Sweep.of(run), 40, "exact", memory=2**34, block=7, compile=False)
    assert chosen.block == 7


def test_blocks_are_balanced_and_within_memory(run):
    sizes = choose(Sweep.of(run), 40, "exact", memory=2**34, block=None, compile=False).sizes
    narrow = choose(Sweep.of(run), 40, "exact", memory=6 * sizes.engine, block=None, compile=False)
    assert 1 <= narrow.block <= 3
