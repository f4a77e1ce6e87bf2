"""Recording changes no number of a training loop, and notes what happened."""

import copy
import itertools
import json
import socket
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, default_collate

from hydragrad.errors import MismatchError, StoreError, UnsupportedError
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.store import Trajectory
from hydragrad.verification import verify
from tests.trajectory.loops import (
    N,
    assert_same_params,
    bind,
    losses,
    make_data,
    make_loader,
    make_model,
    params_of,
    record_run,
    sgd,
    train,
)


def collate_reversed(samples: list[Any]) -> Any:
    """A collate function of one's own."""
    return default_collate(samples[::-1])


class EveryOther:
    """A batch sampler of one's own, without a length."""

    def __iter__(self) -> Iterator[list[int]]:
        yield from ([0, 2, 4], [-1, 3], [4, 4])


def generator() -> torch.Generator:
    """Seeded apart from the global state."""
    return torch.Generator().manual_seed(11)


LOADERS = {
    "sequential": lambda data: DataLoader(data, 4),
    "shuffle": lambda data: DataLoader(data, 4, shuffle=True),
    "shuffle-generator": lambda data: DataLoader(data, 4, shuffle=True, generator=generator()),
    "drop-last": lambda data: DataLoader(data, 4, shuffle=True, drop_last=True),
    "sampler": lambda data: DataLoader(data, 4, sampler=RandomSampler(data, replacement=True, num_samples=13)),
    "batch-sampler": lambda data: DataLoader(data, batch_sampler=EveryOther()),
    "collate": lambda data: DataLoader(data, 4, shuffle=True, collate_fn=collate_reversed),
    "unbatched": lambda data: DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 4, False)),
    "workers": lambda data: DataLoader(data, 4, shuffle=True, num_workers=2),
    "workers-persistent": lambda data: DataLoader(data, 4, shuffle=True, num_workers=2, persistent_workers=True),
    "workers-generator": lambda data: DataLoader(
        data, 4, num_workers=2, collate_fn=collate_reversed, sampler=RandomSampler(data, generator=generator())
    ),
}


@pytest.mark.parametrize("stop_after", [None, 2])
@pytest.mark.parametrize("name", LOADERS)
def test_a_recorded_loop_ends_bit_for_bit_as_without_recording(
    name: str, stop_after: int | None, tmp_path: Path
) -> None:
    data = make_data()
    torch.manual_seed(7)
    plain = make_model()
    train(plain, sgd(plain), LOADERS[name](data), stop_after=stop_after)
    drawn = torch.rand(3)

    torch.manual_seed(7)
    recorded = make_model()
    optimizer = sgd(recorded)
    with record(tmp_path / "run", recorded, optimizer, checkpoint_every=3) as recording:
        train(recorded, optimizer, LOADERS[name](data), recording.batches, stop_after=stop_after)
    assert_same_params(params_of(recorded), params_of(plain))
    assert torch.equal(torch.rand(3), drawn)  # not one random number more or less

    collate = collate_reversed if name in ("collate", "workers-generator") else None
    run = bind(tmp_path / "run", collate_fn=collate)
    assert verify(run).exact, verify(run)
    assert_same_params(run.replay().params, params_of(plain))


def test_persistent_workers_that_ran_before_are_shared_not_doubled(tmp_path: Path) -> None:
    def warmed() -> tuple[DataLoader, nn.Module]:
        torch.manual_seed(7)
        loader = LOADERS["workers-persistent"](make_data())
        list(loader)
        return loader, make_model()

    loader, plain = warmed()
    train(plain, sgd(plain), loader, stop_after=3)
    expected = [batch[0] for batch in loader]
    loader, model = warmed()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        train(model, optimizer, loader, recording.batches, stop_after=3)
    assert_same_params(params_of(model), params_of(plain))
    assert all(torch.equal(a, batch[0]) for a, batch in zip(expected, loader, strict=True))


def test_ids_and_epochs_are_what_the_sampler_drew(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    data = make_data()
    loader = DataLoader(data, 5, shuffle=True)
    model = make_model()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        batches = recording.batches(loader)
        assert len(batches) == len(loader) == 5
        for _ in range(2):
            for batch in batches:
                seen.append(batch[0])
                optimizer.zero_grad()
                losses(model, batch).mean().backward()
                optimizer.step()
    steps = Trajectory(tmp_path / "run").steps
    assert [step.epoch for step in steps] == [0] * 5 + [1] * 5
    assert sorted(torch.cat([step.batches[0] for step in steps[:5]]).tolist()) == list(range(N))
    for step, points in zip(steps, seen, strict=True):
        assert torch.equal(data.tensors[0][step.batches[0]], points)


def test_batches_from_anywhere_with_ids_given(tmp_path: Path) -> None:
    data, ids = make_data(), [[3, 1], [2, 2, 0], [21]]
    model = make_model()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        for batch in recording.batches((data[i] for i in ids), indices=ids):
            losses(model, batch).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = bind(tmp_path / "run")
    assert [step.batches[0].tolist() for step in run.steps] == ids
    assert verify(run).exact


def test_accumulated_skipped_and_zeroed_batches_are_told_apart(tmp_path: Path) -> None:
    data, model = make_data(), make_model()
    optimizer = sgd(model)
    ids = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11], [12], [13]]
    with record(tmp_path / "run", model, optimizer) as recording:
        for place, batch in enumerate(recording.batches([data[i] for i in ids], indices=ids)):
            if place == 2:
                continue  # asked for, never used
            if place in (5, 6):
                optimizer.zero_grad(set_to_none=place == 5)  # throws away the gradients of 4, then of 5
            losses(model, batch).mean().backward()
            if place in (1, 3, 6):  # 0 and 1 accumulate; 4 and 5 are thrown away
                optimizer.step()
                optimizer.zero_grad(set_to_none=False)
    trajectory = Trajectory(tmp_path / "run")
    assert [[ids.tolist() for ids in step.batches] for step in trajectory.steps] == [[[0, 1], [2, 3]], [[6, 7]], [[12]]]
    assert [[ids.tolist() for ids in step.skipped] for step in trajectory.steps] == [[], [[4, 5]], [[8, 9], [10, 11]]]
    assert trajectory.trailing == [[13]]
    assert verify(bind(tmp_path / "run")).exact


def test_randomness_in_a_step_is_noted_and_only_there(tmp_path: Path) -> None:
    model, data = make_model(), make_data()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(data, 8, shuffle=True))):
            optimizer.zero_grad()
            if place == 1:
                torch.rand(1)
            losses(model, batch).mean().backward()
            optimizer.step()
            torch.rand(1)
    assert [step.random for step in Trajectory(tmp_path / "run").steps] == [False, True, False]

    optimizer.zero_grad()
    with record(tmp_path / "accumulated", model, optimizer) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(data, 6, shuffle=True))):
            if place == 2:
                torch.rand(1)  # in the first micro-batch of the second step
            losses(model, batch).mean().backward()
            if place % 2:
                optimizer.step()
                optimizer.zero_grad()
    assert [step.random for step in Trajectory(tmp_path / "accumulated").steps] == [False, True]


def test_hooks_are_gone_afterwards_also_after_an_exception(tmp_path: Path) -> None:
    model = make_model()
    optimizer = sgd(model)

    def fail() -> None:
        if len(optimizer.state) and fail_at.pop() == 0:
            raise RuntimeError("out of luck")

    fail_at = [0, 1, 1]
    with pytest.raises(RuntimeError, match=r"out of luck"):
        record_run(tmp_path / "run", model, optimizer, on_step=fail, checkpoint_every=2)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert all(not param._post_accumulate_grad_hooks for param in model.parameters())
    assert "_compiled_call_impl" not in model.__dict__
    trajectory = Trajectory(tmp_path / "run")
    assert not trajectory.complete
    assert "out of luck" in trajectory.reason
    assert len(trajectory) == 3
    assert trajectory.checkpoints == (0, 2, 3)
    assert_same_params(bind(tmp_path / "run").replay().params, params_of(model))


def test_copies_of_a_model_that_is_recorded_are_on_their_own(tmp_path: Path) -> None:
    """An average of the weights, or a file: neither keeps the recording alive, nor is it noted as the model."""
    model = make_model()
    optimizer, batch = sgd(model), next(iter(make_loader()))
    with record(tmp_path / "run", model, optimizer) as recording:
        assert not recording._described().extra["compiled"]
        twin = copy.deepcopy(model)
        torch.save(model, tmp_path / "model.pt")
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for other in (twin, torch.load(tmp_path / "model.pt", weights_only=False)):
                assert "_compiled_call_impl" not in vars(other)
                next(other.parameters()).zero_()
                other(batch[0])
        for batch in recording.batches(make_loader()):
            twin(batch[0])
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
    run = bind(tmp_path / "run")
    assert not any(cast for step in run.steps for cast in step.autocast)
    assert verify(run).exact
    assert_same_params(run.replay().params, params_of(model))


class Stream(IterableDataset):
    """Examples without ids."""

    def __iter__(self) -> Iterator[Any]:
        return iter(make_data())


def test_what_cannot_be_watched_is_refused(tmp_path: Path) -> None:
    model, data = make_model(), make_data()
    optimizer = sgd(model)
    with record(tmp_path / "run", model, optimizer) as recording:
        with pytest.raises(UnsupportedError, match=r"iterable data set have no ids.*indices="):
            recording.batches(DataLoader(Stream(), 4))
        with pytest.raises(UnsupportedError, match=r"out of order.*in_order=False with 1 workers"):
            recording.batches(DataLoader(data, 4, num_workers=1, in_order=False))
        with pytest.raises(UnsupportedError, match=r"ids of these batches are unknown.*Got: list"):
            recording.batches([1, 2])
        recording.batches(DataLoader(data, 4))
        with pytest.raises(UnsupportedError, match=r"different data sets"):
            recording.batches(DataLoader(make_data(), 4))
        with pytest.raises(MismatchError, match=r"step without a recorded batch.*iterates the loader itself"):
            optimizer.step()
        with pytest.raises(UnsupportedError, match=r"closure"):
            optimizer.step(lambda: 0.0)
    with pytest.raises(MismatchError, match=r"param group 0 .* no parameter of the model"):
        record(tmp_path / "other", model, sgd(make_model()))


def test_models_and_optimizers_that_cannot_be_recorded_are_refused(tmp_path: Path) -> None:
    model = make_model()
    make: Any = make_model
    with pytest.raises(UnsupportedError, match=r"no torch\.nn\.Module.*Got: make_model.*not model=build"):
        record(tmp_path / "run", make, sgd(model))
    several: Any = [sgd(model), sgd(model)]
    with pytest.raises(UnsupportedError, match=r"not an optimizer.*Got: list.*several.*in param groups"):
        record(tmp_path / "run", model, several)
    model.register_parameter("phase", nn.Parameter(torch.zeros(2, dtype=torch.complex128)))
    with pytest.raises(UnsupportedError, match=r"'phase' is torch\.complex128.*view_as_real"):
        record(tmp_path / "run", model, sgd(model))
    assert not (tmp_path / "run").exists()


def test_a_sparse_momentum_is_refused_at_the_first_step(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Embedding(N, 3, sparse=True), nn.Linear(3, 3))
    optimizer, batches = sgd(model), [torch.arange(4), torch.arange(4, 8)]
    with record(tmp_path / "run", model, optimizer) as recording:
        passing = iter(recording.batches(batches, indices=[[0, 1, 2, 3], [4, 5, 6, 7]]))
        model(next(passing)).sum().backward()
        with pytest.raises(UnsupportedError, match=r"'momentum_buffer' of parameter '0\.weight' as a sparse.*sparse=F"):
            optimizer.step()
        optimizer.state.clear()  # or the end of the recording, which stores a state, would be refused likewise


def test_a_second_step_on_one_batch_is_refused_with_what_to_do(tmp_path: Path) -> None:
    model = make_model()
    optimizer = sgd(model)
    words = r"without a recorded batch.*a second optimizer.step\(\).*several times"
    with record(tmp_path / "run", model, optimizer) as recording:
        for batch in recording.batches(DataLoader(make_data(), 5)):
            losses(model, batch).mean().backward()
            optimizer.step()
            with pytest.raises(MismatchError, match=words):
                optimizer.step()


def ahead(batches: Iterable[Any]) -> Iterator[Any]:
    """The next batch is fetched while one is trained on."""
    given = iter(batches)
    held = next(given, None)
    while held is not None:
        batch, held = held, next(given, None)
        yield batch


def repeated(batches: Iterable[Any]) -> Iterator[Any]:
    return itertools.islice(itertools.cycle(batches), 12)


@pytest.mark.parametrize("taken", [list, repeated, ahead])
def test_batches_taken_ahead_of_their_steps_are_refused_and_named(taken: Callable[..., Any], tmp_path: Path) -> None:
    model, loader = make_model(), DataLoader(make_data(), 5)
    optimizer = sgd(model)
    words = r"without a recorded batch.*fetched ahead of their steps: list\(recording.*, itertools.cycle"
    with record(tmp_path / "run", model, optimizer) as recording, pytest.raises(MismatchError, match=words):
        train(model, optimizer, loader, lambda loader: taken(recording.batches(loader)))


def test_a_batch_that_is_yielded_for_each_of_its_steps(tmp_path: Path) -> None:
    """What the refusal of a second step advises."""
    model, data = make_model(), make_data()
    optimizer = sgd(model)
    ids = [[*range(k, k + 5)] for k in (0, 5, 10) for _ in range(2)]
    points, labels = data.tensors
    with record(tmp_path / "run", model, optimizer) as recording:
        for batch in recording.batches([[points[one], labels[one]] for one in ids], indices=ids):
            optimizer.zero_grad()
            losses(model, batch).mean().backward()
            optimizer.step()
    run = bind(tmp_path / "run")
    assert run.num_steps == 6
    assert_same_params(run.replay().params, params_of(model))


def test_an_existing_run_is_kept_unless_overwritten(tmp_path: Path) -> None:
    record_run(tmp_path / "run", epochs=1)
    with pytest.raises(StoreError, match=r"already holds a recorded run.*overwrite=True"):
        record_run(tmp_path / "run")
    with pytest.raises(ZeroDivisionError), record(tmp_path / "run", m := make_model(), sgd(m), overwrite=True):
        _ = 1 / 0  # the new one never took a step: the old one stays
    assert len(Trajectory(tmp_path / "run")) == 5
    record_run(tmp_path / "run", epochs=2, overwrite=True)
    assert len(Trajectory(tmp_path / "run")) == 10
    with (
        record(tmp_path / "busy", m := make_model(), sgd(m)),
        pytest.raises(StoreError, match=r"being recorded into by another"),
    ):
        record_run(tmp_path / "busy")
    (tmp_path / "stale").mkdir()
    lock = {"pid": 999_999_999, "host": socket.gethostname()}
    (tmp_path / "stale" / "recording.lock").write_text(json.dumps(lock))
    record_run(tmp_path / "stale")


def test_no_step_leaves_an_empty_run(tmp_path: Path) -> None:
    model = make_model()
    with record(tmp_path / "run", model, sgd(model)):
        pass
    run = bind(tmp_path / "run")
    assert run.num_steps == 0
    assert run.trajectory.complete
    assert_same_params(run.replay().params, params_of(model))
