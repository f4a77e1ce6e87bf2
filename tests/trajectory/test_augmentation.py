"""Random augmentation that can be repeated, and batches that are kept because their data cannot."""

import contextlib
import pickle
import random
import warnings
from collections import OrderedDict, namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    RandomSampler,
    Subset,
    TensorDataset,
    default_collate,
)

from hydragrad.attributing import attribute
from hydragrad.errors import MismatchError, StoreError, UnsupportedError
from hydragrad.run import Run
from hydragrad.trajectory.augmentation import Augmented, EpochIndex, EpochIndices
from hydragrad.trajectory.keeping import decode_batches, encode_batches, keep
from hydragrad.trajectory.randomness import RandomState
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.store import Trajectory
from hydragrad.verification import verify
from tests.tolerances import FINITE_DIFFERENCE, assert_close
from tests.trajectory.loops import N, assert_same_params, bind, losses, make_data, make_model, params_of, sgd, train

warnings.filterwarnings("ignore", message="This DataLoader will create")


class Noisy(Dataset):
    """The ordinary points, each time with other noise of all three generators."""

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: Any) -> Any:
        points, labels = make_data()[index]
        shape = points.shape
        noise = torch.randn(shape) + torch.from_numpy(np.random.standard_normal(shape)).float() + random.random()
        return points + 0.1 * noise, labels


LOADERS: dict[str, Any] = {
    "plain": lambda data: DataLoader(data, 5, shuffle=True),
    "workers": lambda data: DataLoader(data, 5, shuffle=True, num_workers=2),
    "persistent": lambda data: DataLoader(data, 5, shuffle=True, num_workers=2, persistent_workers=True),
    "unbatched": lambda data: DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), 5, False)),
}


def recorded(path: Path, data: Any, loader: str = "plain", epochs: int = 3, **options: Any) -> tuple[Any, list[Any]]:
    """The trained model, and the batches that it saw."""
    torch.manual_seed(3)
    model, seen = make_model(), []
    optimizer = sgd(model)
    with record(path, model, optimizer, checkpoint_every=4, **options) as recording:

        def batches(loader: Any) -> Any:
            for batch in recording.batches(loader):
                seen.append([part.clone() for part in batch])
                yield batch

        train(model, optimizer, LOADERS[loader](data), batches, epochs=epochs)
    return model, seen


@pytest.mark.filterwarnings("ignore:This DataLoader")
@pytest.mark.parametrize("loader", LOADERS)
def test_augmented_data_replays_bit_for_bit_and_differs_by_epoch(loader: str, tmp_path: Path) -> None:
    data = Augmented(Noisy())
    model, seen = recorded(tmp_path / "run", data, loader)
    run = bind(tmp_path / "run", data=Augmented(Noisy()))
    found = verify(run)
    assert found.exact, found
    assert_same_params(run.replay().params, params_of(model))
    rows: dict[int, list[Tensor]] = {}
    for step, (points, _) in zip(run.steps, seen, strict=True):
        for k, i in enumerate(step.batches[0].tolist()):
            rows.setdefault(i, []).append(points[k])
    assert all(len(versions) == 3 for versions in rows.values())
    assert not any(torch.equal(a, b) for a, b, c in rows.values() for b in (b, c))
    if loader != "unbatched":  # where a whole list of positions is drawn together
        asked = Augmented(Noisy())[EpochIndex(7, 1)][0]
        assert torch.equal(asked, rows[7][1])
    with pytest.raises(MismatchError, match=r"examples at step 0 differ|content of the data changed"):
        bind(tmp_path / "run", data=Augmented(Noisy(), seed=1))


def test_the_callers_generators_and_plain_positions(tmp_path: Path) -> None:
    data = Augmented(Noisy(), seed=5)
    before = RandomState.capture().tensors()
    first = data[3][0]
    for name, state in RandomState.capture().tensors().items():
        assert torch.equal(state, before[name])
    assert torch.equal(data[3][0], first)
    assert torch.equal(data[3 - N][0], first)
    assert torch.equal(data[EpochIndex(3, 0)][0], first)
    assert not torch.equal(data[EpochIndex(3, 1)][0], first)
    assert not torch.allclose(data[4][0] - make_data()[4][0], first - make_data()[3][0], atol=1e-3)
    assert len(data) == N
    index = pickle.loads(pickle.dumps(EpochIndex(3, 9)))
    assert (index, index.epoch, type(index)) == (3, 9, EpochIndex)
    many = pickle.loads(pickle.dumps(EpochIndices.of([3, 0], 1)))
    assert (many, many.epoch, type(many)) == ([3, 0], 1, EpochIndices)
    for given, one in zip(
        data.__getitems__(many), (3, 0), strict=True
    ):  # a batch's examples are those asked for singly
        assert torch.equal(given[0], data[EpochIndex(one, 1)][0])


def test_augmentation_below_another_data_set_is_refused(tmp_path: Path) -> None:
    model = make_model()
    below = Augmented(Noisy())
    with record(tmp_path / "run", model, sgd(model)) as recording:
        for data in (Subset(below, [1, 2]), ConcatDataset([Noisy(), Subset(below, [1])])):
            with pytest.raises(UnsupportedError, match=r"not the outermost data set.*wrap the whole data set last"):
                recording.batches(DataLoader(data))
        recording.batches(DataLoader(Augmented(Subset(Noisy(), [1, 2]))))


def test_scores_use_what_each_epoch_saw(tmp_path: Path) -> None:
    """The same run on data where every epoch's version of an example is an example of its own."""
    data, queries = Augmented(Noisy()), [make_data()[i] for i in range(3)]
    recorded(tmp_path / "run", data)
    run = bind(tmp_path / "run", data=data)
    versions = [data[EpochIndex(i, epoch)] for epoch in range(3) for i in range(N)]
    ids = [(step.batches[0] + N * step.epoch).tolist() for step in run.steps]
    model = make_model()
    optimizer = sgd(model)
    spread = TensorDataset(torch.stack([x for x, _ in versions]), torch.stack([y for _, y in versions]))
    with record(tmp_path / "spread", model, optimizer) as recording:
        train(model, optimizer, [spread[i] for i in ids], lambda b: recording.batches(b, indices=ids), epochs=1)
    expected = attribute(bind(tmp_path / "spread", data=spread), queries, check=False, progress=False).values
    found = attribute(run, queries, check=False, progress=False).values
    assert_close(found, expected.view(3, N, 3).sum(0), {torch.float32: 1e-4})


def test_random_data_without_the_wrapper_is_told_about_it(tmp_path: Path) -> None:
    recorded(tmp_path / "run", Noisy())
    with pytest.raises(MismatchError, match=r"other content each time.*Augmented\(train_set\).*keep_batches=True"):
        bind(tmp_path / "run", data=Noisy())


# ---------------------------------------------------------------------------------------------------------------
# Kept batches


def kept(path: Path) -> Run:
    recorded(path, Noisy(), keep_batches=True)
    return bind(path, data=Noisy())


def mixup(points: Tensor) -> Tensor:
    share, other = torch.rand(()), torch.randperm(len(points))
    return share * points + (1 - share) * points[other]


def mixing(samples: Any) -> Any:
    """A collate function that mixes its examples at random."""
    points, labels = default_collate(samples)
    return mixup(points), labels


def mixed_losses(model: nn.Module, batch: Any) -> Tensor:
    """The same in the loss, in training alone."""
    return losses(model, (mixup(batch[0]) if model.training else batch[0], batch[1]))


EITHER: dict[str, Any] = {
    "collate": {"collate": mixing, "loss": losses},
    "kept": {"collate": mixing, "loss": losses, "record": {"keep_batches": True}},
    "loss": {"collate": default_collate, "loss": mixed_losses},
}


def trained_mixing(kind: str, weights: Tensor, data: Any, batches: Any = iter, optimizer: Any = None) -> nn.Module:
    torch.manual_seed(3)
    model, given = make_model(torch.float64), EITHER[kind]
    loader = DataLoader(data, 5, collate_fn=given["collate"])
    place, optimizer = 0, sgd(model) if optimizer is None else optimizer(model)
    for _ in range(2):
        for batch in batches(loader):
            ids = torch.arange(place, place + len(batch[0]))
            place = 0 if int(ids[-1]) == N - 1 else place + len(ids)
            optimizer.zero_grad()
            (weights[ids] * given["loss"](model, batch)).mean().backward()
            optimizer.step()
    return model


def record_mixing(path: Path, kind: str, data: Any) -> None:
    with contextlib.ExitStack() as stack:
        recording: list[Any] = []

        def optimizer(model: nn.Module) -> Any:
            made = sgd(model)
            recording.append(stack.enter_context(record(path, model, made, **EITHER[kind].get("record", {}))))
            return made

        ones = torch.ones(N, dtype=torch.float64)
        trained_mixing(kind, ones, data, lambda loader: recording[0].batches(loader), optimizer)


def test_mixup_in_the_collate_function_is_told_what_works(tmp_path: Path) -> None:
    for name, data in (("plain", make_data()), ("augmented", Augmented(make_data()))):
        record_mixing(tmp_path / name, "collate", wide(data))
        with pytest.raises(MismatchError, match=r"collate_fn gives other content.*if model.training.*keep_batches"):
            bind(tmp_path / name, model=make_model(torch.float64), data=wide(data), collate_fn=mixing)


def wide(data: Any) -> Any:
    """The same in float64."""
    if isinstance(data, Augmented):
        return Augmented(wide(data.dataset))
    return TensorDataset(data.tensors[0].double(), data.tensors[1])


@pytest.mark.parametrize("kind", ["kept", "loss"])
def test_mixup_in_the_loss_or_kept_has_exact_scores(kind: str, tmp_path: Path) -> None:
    data, h = wide(make_data()), 1e-5
    record_mixing(tmp_path / "run", kind, data)
    model, loss = make_model(torch.float64), EITHER[kind]["loss"]
    run = bind(tmp_path / "run", model=model, loss=loss, data=data, collate_fn=default_collate)
    assert verify(run).exact
    queries = [data[i] for i in range(3)]
    scores = attribute(run, queries, check=False, progress=False).values

    def measured(weights: Tensor) -> Tensor:
        return losses(trained_mixing(kind, weights, data), default_collate(queries)).detach()

    for example in (0, 7, 21):
        step = torch.zeros(N, dtype=torch.float64)
        step[example] = h
        assert_close(scores[example], -(measured(1 + step) - measured(1 - step)) / (2 * h), FINITE_DIFFERENCE)


def test_queries_that_are_mixed_at_random_are_refused(tmp_path: Path) -> None:
    data = wide(make_data())
    record_mixing(tmp_path / "run", "kept", data)
    run = bind(tmp_path / "run", model=make_model(torch.float64), data=data, collate_fn=mixing)
    with pytest.raises(MismatchError, match="the queries have other content each time"):
        attribute(run, [data[i] for i in range(3)], check=False, progress=False)


def test_kept_batches_replay_bit_for_bit(tmp_path: Path) -> None:
    model, seen = recorded(tmp_path / "run", Noisy(), keep_batches=True)
    run = bind(tmp_path / "run", data=Noisy())
    found = verify(run)
    assert found.exact, found
    assert_same_params(run.replay().params, params_of(model))
    replayer = run.replayer()
    for step in (0, 14, 6, 7):
        ((ids, batch),) = replayer.batches(run.steps[step])
        assert torch.equal(ids, run.steps[step].batches[0])
        assert all(torch.equal(a, b) for a, b in zip(batch, seen[step], strict=True))
    scores = attribute(run, [make_data()[0]], check=False, progress=False).values
    assert scores.isfinite().all()


def test_kept_batches_are_vouched_for_by_the_journal(tmp_path: Path) -> None:
    run = kept(tmp_path / "run")
    assert run.trajectory.keeps_batches
    path = tmp_path / "run" / "batches" / "00000004.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(StoreError, match=r"batches/00000004.safetensors was altered"):
        bind(tmp_path / "run", data=Noisy()).replay()
    path.unlink()
    with pytest.raises(StoreError, match=r"batches/00000004.safetensors is missing"):
        Trajectory(tmp_path / "run")
    recorded(tmp_path / "run", make_data(), overwrite=True)
    assert not list((tmp_path / "run" / "batches").iterdir())


def test_what_the_loop_does_to_a_batch_afterwards_is_not_kept(tmp_path: Path) -> None:
    model, data = make_model(), make_data()
    optimizer = sgd(model)
    first = data.tensors[0][:4].clone()
    with record(tmp_path / "run", model, optimizer, keep_batches=True) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(data, 4))):
            loss = losses(model, batch).mean()
            if place % 2:
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            with torch.no_grad():
                batch[0].mul_(0)
    run = bind(tmp_path / "run")
    assert [len(step.skipped) for step in run.steps] == [1, 1, 1]
    assert not torch.equal(run.trajectory.batches(0)[0][0], first)
    assert torch.equal(run.trajectory.batches(0)[0][0], data.tensors[0][4:8])
    assert verify(run).exact


Pair = namedtuple("Pair", ["x", "y"])


def test_containers_come_back_and_odd_ones_are_refused(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    batch = {"x": shared[::2], 3: [shared, (None, "a", True, 2, 0.5)], "n": np.arange(3), "e": torch.zeros(0, 2)}
    path = tmp_path / "file"
    path.write_bytes(encode_batches([keep(batch), keep(OrderedDict(a=1)), keep(shared.bool())]))
    first, second, third = decode_batches(path, path.read_bytes())
    assert list(first) == ["x", 3, "n", "e"]
    assert torch.equal(first["x"], shared[::2])
    assert torch.equal(first[3][0], shared)
    assert first[3][1] == (None, "a", True, 2, 0.5)
    assert isinstance(first["n"], np.ndarray)
    assert first["n"].tolist() == [0, 1, 2]
    assert first["e"].shape == (0, 2)
    assert second == {"a": 1}
    assert third.dtype == torch.bool
    for odd in (Pair(1, 2), {1, 2}, torch.zeros(2, 2).to_sparse(), {(1, 2): 3}):
        with pytest.raises(UnsupportedError, match=r"a batch cannot be kept.*collate_fn"):
            keep(odd)
