"""Fitting a sweep into budgets: nothing else that fits is faster, and what is promised adds up."""

import itertools
from dataclasses import replace

import pytest

from hydragrad.arranging import Arrangement, Needs, arrange
from hydragrad.errors import UnsupportedError
from hydragrad.hypergradient.rehearsing import Costs

COSTS = Costs(advance=2e-3, capture=1e-3, load=1e-2, step=3e-3, query=1e-3, work=50_000_000, alone=12_500_000)
LARGE = Needs(
    steps=400, stretches=((100, 4),), queries=20, block=4, costs=COSTS, fixed=40_000_000, each=12_500_000,
    adjoint=8_000_000, column=40_000, slot=12_000_000, stored=8_000_000,
)  # fmt: skip
UNEVEN = replace(LARGE, steps=137, stretches=((37, 1), (100, 1)), queries=3, block=3)
ONE = replace(LARGE, steps=60, stretches=((60, 1),), queries=1, block=1)
SHORT = replace(LARGE, steps=3, stretches=((1, 3),))
EVERY = [LARGE, UNEVEN, ONE, SHORT]


def smallest(needs: Needs) -> int:
    """Bytes of one query at a time with as few states as will do."""
    return needs.bytes(Arrangement(1, needs.least))


def everything(needs: Needs, disk: int) -> list[Arrangement]:
    """All arrangements with sweeps of about the same width."""
    widths = {-(-needs.queries // sweeps) for sweeps in range(1, needs.queries + 1)}
    states = range(needs.least, needs.longest + 1)
    return [Arrangement(*each) for each in itertools.product(widths, states, range(disk // needs.stored + 1))]


@pytest.mark.parametrize("needs", EVERY)
@pytest.mark.parametrize("disk", [0, 40_000_000])
@pytest.mark.parametrize("factor", [1.0, 1.3, 2.0, 4.0, 8.0, 20.0])
def test_nothing_that_fits_is_faster(needs: Needs, disk: int, factor: float) -> None:
    memory = int(factor * smallest(needs))
    chosen = arrange(needs, memory, disk, None)
    assert needs.bytes(chosen) <= memory
    assert chosen.on_disk * needs.stored <= disk
    assert chosen.slots <= needs.longest
    fitting = [other for other in everything(needs, disk) if needs.bytes(other) <= memory]
    fastest = min(needs.seconds(other) for other in fitting)
    assert needs.seconds(chosen) <= 1.03 * fastest  # numbers of states on disk are compared by powers of two


@pytest.mark.parametrize("needs", EVERY)
def test_more_memory_never_takes_longer(needs: Needs) -> None:
    plans = [arrange(needs, int(smallest(needs) * 1.2**k), 0, None) for k in range(30)]
    seconds = [needs.seconds(plan) for plan in plans]
    assert seconds == sorted(seconds, reverse=True)
    assert plans[0] == Arrangement(1, needs.least)
    assert plans[-1] == Arrangement(needs.queries, needs.longest)


@pytest.mark.parametrize("needs", EVERY)
def test_too_little_memory_gives_the_smallest(needs: Needs) -> None:
    assert arrange(needs, smallest(needs) - 1, 10**9, None) == Arrangement(1, needs.least)


def test_states_on_disk_spare_replays() -> None:
    memory = LARGE.bytes(Arrangement(20, 4))
    without, with_ = arrange(LARGE, memory, 0, None), arrange(LARGE, memory, 10**9, None)
    assert without.on_disk == 0
    assert with_.on_disk > 0
    assert LARGE.replayed(with_) < LARGE.replayed(without)
    assert LARGE.seconds(with_) < LARGE.seconds(without)
    slow = replace(LARGE, costs=replace(COSTS, load=10.0))
    assert arrange(slow, memory, 10**9, None).on_disk == 0  # a disk that slow is not worth it


def test_by_hand() -> None:
    plan = Arrangement(10, 10)
    assert LARGE.replayed(plan) == 4 * 253  # see Schedule
    assert LARGE.times(plan) == 3
    assert LARGE.bytes(plan) == 40_000_000 + 20 * 40_000 + 50_000_000 + 10 * 8_040_000 + 10 * 12_000_000
    assert LARGE.bytes(Arrangement(20, 10)) == 40_000_000 + 20 * 40_000 + 50_000_000 + 20 * 8_000_000 + 120_000_000
    assert LARGE.bytes(Arrangement(2, 2)) == 40_000_000 + 20 * 40_000 + 2 * 12_500_000 + 2 * 8_040_000 + 24_000_000
    replay = 1012 * 2e-3 + 400 * 1e-3 + 5 * 1e-2
    assert LARGE.seconds(plan) == pytest.approx(2 * (replay + 400 * 3e-3) + 400 * 20 * 1e-3)


def test_as_many_replays_as_allowed() -> None:
    memory = LARGE.bytes(Arrangement(5, 12))
    free = arrange(LARGE, memory, 0, None)
    total = free.sweeps(20) * LARGE.replayed(free) / 400
    assert arrange(LARGE, memory, 0, total) == free
    with pytest.raises(UnsupportedError, match=r"replays=\d+\.\d\d or more within .*memory=\d+ for one replay.*Got"):
        arrange(LARGE, memory, 0, 1.5)
    whole = LARGE.bytes(Arrangement(20, 100))
    assert arrange(LARGE, whole, 0, 1.0) == Arrangement(20, 100)
    with pytest.raises(UnsupportedError):
        arrange(LARGE, whole - 1, 0, 1.0)
