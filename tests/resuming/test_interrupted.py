"""Attributions in pieces: killed at any moment they go on, and end bit for bit as if nothing had happened."""

import os
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import hydragrad as hg
from hydragrad.hypergradient.hoisting import Halves
from hydragrad.hypergradient.tracing import TracedFunction
from tests.children import PATIENCE, ended, fork, kill
from tests.faults import Disk, full
from tests.hypergradient.recorded import recipe_of, recorded
from tests.resuming.pieces import JOURNAL, STEPS, asked, on_step
from tests.zoo import N_TRAIN, case


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


def lines_of(journal: Path) -> int:
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def test_sweeps_that_are_killed_at_random_moments_go_on(
    run: hg.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_pieces: None
) -> None:
    expected, chance, found = asked(run, None).values, random.Random(2), set[int]()
    for attempt in range(12):
        folder = tmp_path / f"{attempt}"

        def work(folder: Path = folder) -> None:
            on_step(monkeypatch, lambda: time.sleep(0.002))
            asked(run, folder)
            time.sleep(PATIENCE)

        child, lines = fork(work), 1 + attempt % 4  # the journal's, not a clock's: a busy machine is no less random
        deadline = time.monotonic() + PATIENCE
        while lines_of(folder / JOURNAL) < lines and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.02))
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
        assert isinstance(graph, Halves)
        return replace(graph, block=lambda *tensors: [x * (1 + 1e-5) for x in graph.block(*tensors)]), form

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
