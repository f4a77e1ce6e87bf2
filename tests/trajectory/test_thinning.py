"""States on disk within a budget: evenly spaced however long the run, struck from the journal before they go."""

import contextlib
import itertools
import os
from pathlib import Path

import pytest

from hydragrad.errors import HydragradError, StoreError
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.store import Trajectory
from hydragrad.trajectory.thinning import Thinning
from hydragrad.trajectory.validation import check_entries
from hydragrad.verification import verify
from tests.children import ended, fork
from tests.faults import Disk, full
from tests.trajectory.loops import (
    assert_same_params,
    bind,
    losses,
    make_loader,
    make_model,
    params_of,
    record_run,
    sgd,
)

SIZE = 1000


@pytest.mark.parametrize("slots", [3, 4, 5, 8, 20])
@pytest.mark.parametrize("every", [1, 10])
def test_states_stay_within_their_budget_and_evenly_spaced(slots: int, every: int) -> None:
    thinning = Thinning(every, slots * SIZE)
    for step in range(0, 2000, every):
        if not thinning.due(step):
            continue
        thinning = thinning.with_room_for(step, SIZE).holding(step, SIZE)
        kept = list(thinning.kept)
        assert len(kept) <= slots
        assert len(kept) * 2 >= min(slots, step // every + 1)  # half of the budget is used at least
        assert kept[0] == 0
        assert kept[-1] == step
        gaps = [b - a for a, b in itertools.pairwise(kept)]
        assert all(gap <= thinning.spacing for gap in gaps)
        assert sum(bool(held % thinning.spacing) for held in kept) <= 1  # the one that made others go


def test_without_a_limit_everything_stays() -> None:
    thinning = Thinning(3)
    for step in range(0, 300, 3):
        assert thinning.due(step)
        assert not thinning.due(step + 1)
        thinning = thinning.with_room_for(step, 10**12).holding(step, 10**12)
    assert len(thinning.kept) == 100


def stored_bytes(folder: Path) -> int:
    total = 0
    for path in folder.glob("checkpoints/*"):
        with contextlib.suppress(FileNotFoundError):  # renamed or dropped meanwhile, beside the training
            total += path.stat().st_size
    return total


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """75 steps with every third state stored: what thinned recordings are compared with."""
    folder = tmp_path_factory.mktemp("thinning") / "whole"
    record_run(folder, epochs=15, checkpoint_every=3)
    return folder


def budget_of(whole: Path, states: int) -> int:
    """Bytes that hold this many states."""
    return states * max(path.stat().st_size for path in whole.glob("checkpoints/*"))


@pytest.mark.parametrize("states", [2, 3, 5, 9])
def test_a_thinned_recording_is_the_same_run(tmp_path: Path, whole: Path, states: int) -> None:
    limit, seen = budget_of(whole, states), list[int]()
    folder = tmp_path / "thin"
    record_run(
        folder,
        epochs=15,
        checkpoint_every=3,
        checkpoint_bytes=limit,
        on_step=lambda: seen.append(stored_bytes(folder) if folder.exists() else 0),
    )
    assert max(*seen, stored_bytes(folder)) <= limit
    thin, run = bind(folder), bind(whole)
    assert thin.trajectory.complete
    assert thin.num_steps == 75
    assert {0, 75} <= set(thin.trajectory.checkpoints) <= set(run.trajectory.checkpoints)
    assert len(list(folder.glob("checkpoints/*"))) == len(thin.trajectory.checkpoints) <= states
    for step in thin.trajectory.checkpoints:
        assert_same_params(thin.trajectory.state(step).params, run.trajectory.state(step).params)
    assert verify(thin).exact


def test_words_for_amounts(tmp_path: Path) -> None:
    record_run(tmp_path / "run", checkpoint_bytes="1 MB")
    assert Trajectory(tmp_path / "run").checkpoints == (0, 4, 8, 10)
    for bad in ("1 parsec", 0, 1.5, "GB", "1 IB"):
        with pytest.raises(HydragradError, match="checkpoint_bytes"):
            record_run(tmp_path / "bad", checkpoint_bytes=bad)


def test_a_recording_that_dies_at_any_single_moment_of_dropping(
    tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, lengths, states = budget_of(whole, 3), list[int](), list(bind(whole).states(0, 26))
    for dies_at in range(200):
        folder = tmp_path / f"{dies_at}"

        def work(folder: Path = folder, dies_at: int = dies_at) -> None:
            disk = Disk(monkeypatch, lambda moment: moment == dies_at, lambda: os._exit(9))
            disk._wrap(monkeypatch, os, "unlink")  # a file's deletion is a moment too
            record_run(folder, epochs=5, checkpoint_every=3, checkpoint_bytes=limit)

        if (status := ended(fork(work))) == 0:
            break
        assert status == 9
        try:
            trajectory = Trajectory(folder)
        except StoreError as error:
            assert "no recorded run" in str(error)  # noqa: PT017
            continue
        lengths.append(len(trajectory))
        for step in trajectory.checkpoints:
            assert_same_params(trajectory.state(step).params, states[step].params)
    else:
        pytest.fail("the recording never got through")
    assert lengths == sorted(lengths)
    assert {3, 12, 24, 25} <= set(lengths)


@pytest.mark.parametrize("fails_at", range(8, 33, 2))
def test_a_loop_that_goes_on_after_the_disk_was_full_stays_within_its_budget(
    fails_at: int, tmp_path: Path, whole: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit, folder, model = budget_of(whole, 3), tmp_path / "run", make_model()
    optimizer, loader, refused = sgd(model), make_loader(), 0
    Disk(monkeypatch, lambda moment: moment == fails_at, full)
    with record(folder, model, optimizer, checkpoint_every=3, checkpoint_bytes=limit) as recording:
        for _ in range(5):
            for batch in recording.batches(loader):
                optimizer.zero_grad()
                losses(model, batch).mean().backward()
                try:
                    optimizer.step()
                except StoreError:
                    refused += 1
    trajectory = Trajectory(folder)
    assert refused == 1
    assert stored_bytes(folder) <= limit
    assert trajectory.complete
    for stored in trajectory.checkpoints:
        trajectory.state(stored)
    assert_same_params(trajectory.state(len(trajectory)).params, params_of(model))


def entry(start: int, stop: int, *, steps: bool = True, state: bool = True, **more: object) -> dict[str, object]:
    return {"start": start, "stop": stop, "steps": {} if steps else None, "checkpoint": {} if state else None, **more}


FIRST, SECOND = entry(0, 0, steps=False), entry(0, 5)
DROPS = [[5], [], [5, 5], [0], [7], ["5"], 5, [10]]


@pytest.mark.parametrize("dropped", DROPS, ids=str)
def test_only_stored_states_may_be_dropped(dropped: object, tmp_path: Path) -> None:
    lines = [FIRST, SECOND, entry(5, 5, steps=False, state=False, dropped=dropped), entry(5, 10)]
    if dropped in ([5], []):
        check_entries(lines, tmp_path)
        return
    with pytest.raises(StoreError, match="to drop states that are stored"):
        check_entries(lines, tmp_path)
    with pytest.raises(StoreError, match="to drop states that are stored"):
        check_entries([*lines[:2], *[entry(5, 5, steps=False, state=False, dropped=[5])] * 2], tmp_path)
