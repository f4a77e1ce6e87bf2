"""Rows of a batch that are not in the order of its ids: collate functions that sort or shuffle are refused."""

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_sequence
from torch.utils.data import BatchSampler, DataLoader, Dataset, SequentialSampler, Subset, default_collate

import hydragrad as hg
from hydragrad.errors import UnsupportedError
from hydragrad.trajectory.batches import BatchSource
from tests.tolerances import FINITE_DIFFERENCE, assert_close

N, WIDTH, CLASSES, EPOCHS = 12, 3, 3, 2
REFUSAL = r"collate_fn reorders its examples.*Remedy: leave them in the order given"
LENGTHS = [3, 1, 4, 2, 5, 2, 3, 1, 6, 4, 2, 5]
Sample = tuple[Tensor, int, int]


class Sequences(Dataset):
    """Sequences [L, WIDTH] of different lengths with a label, and their own position."""

    def __init__(self, count: int = N, seed: int = 0, labels: int = CLASSES) -> None:
        made = torch.Generator().manual_seed(seed)
        self.x = [torch.randn(LENGTHS[i], WIDTH, generator=made, dtype=torch.float64) for i in range(count)]
        self.y = [i % labels for i in range(count)]

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Sample:
        return self.x[index], self.y[index], index


def padded(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """In the order given."""
    xs, ys, ids = zip(*samples, strict=True)
    lengths = torch.tensor([len(x) for x in xs])
    return {"x": pad_sequence(list(xs), True), "n": lengths, "y": torch.tensor(ys), "id": torch.tensor(ids)}


def by_length(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The longest first, as for packing."""
    return padded(sorted(samples, key=lambda sample: -len(sample[0])))


def in_place(samples: list[Sample]) -> dict[str, Tensor]:
    samples.sort(key=lambda sample: len(sample[0]), reverse=True)
    return padded(samples)


def only_labels(samples: Sequence[Sample]) -> tuple[PackedSequence, Tensor]:
    """Of which nothing but the labels has a row for each example."""
    samples = sorted(samples, key=lambda sample: -len(sample[0]))
    return pack_sequence([x for x, _, _ in samples]), torch.tensor([y for _, y, _ in samples])


def shuffled(samples: Sequence[Sample]) -> dict[str, Tensor]:
    return padded(random.sample(list(samples), len(samples)))


def as_list(samples: Sequence[Sample]) -> list[tuple[str, int]]:
    return sorted((repr(x.tolist()), y) for x, y, _ in samples)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return nn.Linear(WIDTH, CLASSES).double()


def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of the mean over a sequence."""
    means = batch["x"].sum(1) / batch["n"][:, None]
    return F.cross_entropy(torch.tanh(model(means)), batch["y"], reduction="none")


def recorded(path: Path, loader: DataLoader, **options: Any) -> None:
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.3, momentum=0.9)
    with hg.record(path, trained, optimizer, **options) as recording:
        for _ in range(EPOCHS):
            for batch in recording.batches(loader):
                optimizer.zero_grad()
                loss(trained, batch).mean().backward()
                optimizer.step()


@pytest.mark.parametrize("collate", [by_length, in_place])
@pytest.mark.parametrize("augmented", [False, True])
def test_a_run_whose_collate_function_sorts_is_refused(collate: Any, augmented: bool, tmp_path: Path) -> None:
    data = hg.Augmented(Sequences()) if augmented else Sequences()
    recorded(tmp_path / "run", DataLoader(data, 4, collate_fn=collate))
    with pytest.raises(UnsupportedError, match=REFUSAL):
        hg.load(tmp_path / "run", model=model(), loss=loss, data=data, collate_fn=collate)


@pytest.mark.parametrize("collate", [by_length, shuffled])
def test_so_is_one_whose_batches_were_kept(collate: Any, tmp_path: Path) -> None:
    recorded(tmp_path / "run", DataLoader(Sequences(), 4, collate_fn=collate), keep_batches=True)
    with pytest.raises(UnsupportedError, match=REFUSAL):
        hg.load(tmp_path / "run", model=model(), loss=loss, data=Sequences(), collate_fn=collate)


def test_kept_batches_need_no_data(tmp_path: Path) -> None:
    recorded(tmp_path / "run", DataLoader(Sequences(), 4, collate_fn=by_length), keep_batches=True)
    hg.load(tmp_path / "run", model=model(), loss=loss, data=[None] * N, collate_fn=by_length)


def test_queries_that_would_be_sorted_are_refused(tmp_path: Path) -> None:
    """Training one by one has no order to keep."""
    recorded(tmp_path / "run", DataLoader(Sequences(), 1, collate_fn=by_length))
    run = hg.load(tmp_path / "run", model=model(), loss=loss, data=Sequences(), collate_fn=by_length)
    with pytest.raises(UnsupportedError, match=REFUSAL):
        hg.attribute(run, Sequences(4, seed=1), check=False, progress=False)


def test_sorting_that_begins_late_is_seen() -> None:
    """The first batches hold sequences of one length each, which sorting leaves in their order."""
    order = sorted(range(N), key=lambda i: LENGTHS[i])
    source = BatchSource(Subset(Sequences(), order), by_length)
    for ids in ([0, 1], [2, 3], [5, 6], [7, 8], [9, 10], [2, 3], [0, 1]):
        assert len(source.fetch(torch.tensor(ids))["y"]) == 2
    with pytest.raises(UnsupportedError, match=REFUSAL):
        source.fetch(torch.tensor([0, 11]))


class Whole(Sequences):
    """Asked for whole batches, as by ``batch_size=None``, or by a loader that knows ``__getitems__``."""

    def __init__(self, sort: bool) -> None:
        super().__init__()
        self.sort = sort

    def many(self, ids: Sequence[int]) -> list[Sample]:
        return [super(Whole, self).__getitem__(i) for i in (sorted(ids) if self.sort else ids)]

    def __getitem__(self, ids: Any) -> Any:
        return padded(self.many(ids)) if isinstance(ids, list) else super().__getitem__(ids)

    __getitems__ = many


def test_data_that_sorts_whole_batches_is_refused(tmp_path: Path) -> None:
    for sort in (False, True):
        whole = BatchSource(Whole(sort), lambda batch: batch, mode="indices")
        many = BatchSource(Whole(sort), padded)
        for source in (whole, many):
            if not sort:
                assert source.fetch(torch.tensor([3, 2, 1]))["id"].tolist() == [3, 2, 1]
                continue
            with pytest.raises(UnsupportedError, match=REFUSAL):
                source.fetch(torch.tensor([3, 2, 1]))


def flat(samples: Sequence[Sample]) -> tuple[Tensor, ...]:
    """One after the other, with offsets: as many as examples, and in no order but their own."""
    ends = torch.tensor([0, *(len(x) for x, _, _ in samples)]).cumsum(0)
    return torch.cat([x for x, _, _ in samples]), ends[:-1], torch.tensor([y for _, y, _ in samples])


def packed(samples: Sequence[Sample]) -> tuple[PackedSequence, Tensor]:
    return pack_sequence([x for x, _, _ in samples], False), torch.tensor([y for _, y, _ in samples])


def masked(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """With a mask that has as many rows as there are examples, by accident."""
    return {**padded(samples), "mask": torch.ones(len(samples), len(samples)).tril()}


def mixed(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Mixup: each with another one."""
    batch, other = padded(samples), torch.randperm(len(samples))
    share = torch.rand(())
    return {**batch, "x": share * batch["x"] + (1 - share) * batch["x"][other], "other": batch["y"][other]}


def insisting(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """Refuses what is not sorted, as enforce_sorted does."""
    assert [len(x) for x, _, _ in samples] == sorted((len(x) for x, _, _ in samples), reverse=True)
    return padded(samples)


def entries(samples: Sequence[Sample]) -> list[tuple[Tensor, int]]:
    return [(x, y) for x, y, _ in samples]


def total(samples: Sequence[Sample]) -> Tensor:
    return torch.stack([x.sum(0) for x, _, _ in samples]).sum(0)


@pytest.mark.parametrize("collate", [padded, flat, packed, masked, mixed, entries, total])
@pytest.mark.parametrize("labels", [1, CLASSES])
def test_what_keeps_the_order_or_shows_none_is_taken(collate: Callable[[Any], Any], labels: int) -> None:
    state = torch.get_rng_state()
    source = BatchSource(Sequences(labels=labels), collate)
    chosen = ([0, 6], [0, 1, 2, 3], [3, 5, 10], [2, 9], [4, 11, 8], [0, 6, 2])
    torch.manual_seed(0)
    made = [source.fetch(torch.tensor(ids)) for ids in chosen]
    torch.manual_seed(0)
    expected = [collate([Sequences(labels=labels)[i] for i in ids]) for ids in chosen]
    assert repr(made) == repr(expected)  # looking draws no random numbers
    torch.set_rng_state(state)


def test_a_loader_of_sorted_batches_may_insist_on_them() -> None:
    source = BatchSource(Sequences(), insisting)
    assert source.fetch(torch.tensor([4, 2, 0, 1]))["id"].tolist() == [4, 2, 0, 1]


class Sorted(BatchSampler):
    """The remedy: the ids of each batch by length."""

    def __iter__(self) -> Any:
        return (sorted(ids, key=lambda i: -LENGTHS[i]) for ids in super().__iter__())


def by_hand(weights: Tensor, queries: Sequences) -> Tensor:
    """The same training with weights on the losses, written out; each query's loss."""
    data, trained = Sequences(), model()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.3, momentum=0.9)
    for _ in range(EPOCHS):
        for first in range(0, N, 4):
            batch = by_length([data[i] for i in range(first, first + 4)])
            optimizer.zero_grad()
            (weights[batch["id"]] * loss(trained, batch)).mean().backward()
            optimizer.step()
    with torch.no_grad():
        return torch.stack([loss(trained, padded([query]))[0] for query in queries])


@pytest.mark.parametrize("how", ["batch sampler", "indices"])
def test_the_remedies_give_the_scores_to_their_examples(how: str, tmp_path: Path) -> None:
    data, queries, h = Sequences(), Sequences(4, seed=1), 1e-5
    sampler = Sorted(SequentialSampler(data), 4, False)
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.3, momentum=0.9)
    loader = DataLoader(data, batch_sampler=sampler, collate_fn=padded)
    with hg.record(tmp_path / "run", trained, optimizer) as recording:
        for _ in range(EPOCHS):
            if how == "indices":
                made = [by_length([data[i] for i in range(first, first + 4)]) for first in range(0, N, 4)]
                batches = recording.batches(made, indices=[batch["id"] for batch in made])
            else:
                batches = recording.batches(loader)
            for batch in batches:
                optimizer.zero_grad()
                loss(trained, batch).mean().backward()
                optimizer.step()
    run = hg.load(tmp_path / "run", model=model(), loss=loss, data=data, collate_fn=padded)
    assert hg.verify(run).exact
    rises = [by_hand(torch.ones(N).double() + h * step, queries) for step in torch.eye(N, dtype=torch.float64)]
    falls = [by_hand(torch.ones(N).double() - h * step, queries) for step in torch.eye(N, dtype=torch.float64)]
    expected = torch.stack([-(a - b) / (2 * h) for a, b in zip(rises, falls, strict=True)])
    scores = hg.attribute(run, queries, check=False, progress=False)
    assert_close(scores.values, expected, FINITE_DIFFERENCE)


def test_torchs_own_collate_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr("hydragrad.trajectory.ordering.OrderWatch.made", lambda *_: made.append(1))
    BatchSource([(torch.zeros(1), 1)] * 3, default_collate).fetch(torch.tensor([0, 1]))
    assert not made
