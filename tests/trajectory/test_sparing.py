"""What is noted of a step only now and then: what a difference there leads to."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import hydragrad as hg
from hydragrad.trajectory.agreement import contents
from hydragrad.trajectory.sparing import digested, fingerprinted

N, BATCH, STEPS = 24, 4, 120
"""Six steps an epoch, so that the examples of each are told by the first pass."""


class Rows(Dataset):
    """Numbers that can be changed by hand for one pass."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(N, 3, generator=generator)
        self.y = torch.randn(N, 1, generator=generator)

    def __len__(self) -> int:
        return N

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.x[index], self.y[index]


def squares(model: nn.Module, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().sum(1)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def recorded(folder: Path, *, wrong: int | None = None, data: Dataset | None = None) -> hg.Run:
    """A run whose gradient was doubled by hand at step ``wrong``."""
    trained, data, count = model(), data or Rows(), 0
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01, momentum=0.9)
    loader = DataLoader(data, batch_size=BATCH, shuffle=True, generator=torch.Generator().manual_seed(1))
    with hg.record(folder, trained, optimizer, reduction="mean", checkpoint_every=100) as recording:
        while count < STEPS:
            for batch in recording.batches(loader):
                optimizer.zero_grad()
                squares(trained, batch).mean().backward()
                if count == wrong:
                    for param in trained.parameters():
                        assert param.grad is not None
                        param.grad.mul_(2)
                optimizer.step()
                count += 1
    return hg.load(folder, model=model(), loss=squares, data=data)


def test_what_is_noted_of_which_step(tmp_path: Path) -> None:
    steps = recorded(tmp_path / "run").steps
    assert [step.index for step in steps if step.fingerprint is not None] == [*range(100), 112]
    assert [step.index for step in steps if None not in step.digests] == [*range(100), 112]
    assert digested(1001, 0)
    assert not digested(1001, 1)
    assert not fingerprinted(1001)


def test_the_first_pass_has_all_digests_however_long_it_is(tmp_path: Path) -> None:
    torch.manual_seed(0)
    data = torch.utils.data.TensorDataset(torch.randn(110, 3), torch.randn(110, 1))
    trained = model()
    optimizer = torch.optim.SGD(trained.parameters(), lr=0.01)
    with hg.record(tmp_path / "run", trained, optimizer, reduction="mean") as recording:
        loader = DataLoader(data, batch_size=1)
        for _ in range(2):
            for batch in recording.batches(loader):
                optimizer.zero_grad()
                squares(trained, batch).mean().backward()
                optimizer.step()
    steps = hg.load(tmp_path / "run", model=model(), loss=squares, data=data).steps
    assert [step.index for step in steps if None in step.digests] == [t for t in range(110, 220) if t % 16]
    assert [step.index for step in steps if step.fingerprint is None] == [t for t in range(100, 220) if t % 16]


@pytest.mark.parametrize("wrong", [101, 111])
def test_a_gradient_changed_at_a_step_that_was_not_noted_is_refused_at_the_next_that_was(
    tmp_path: Path, wrong: int
) -> None:
    run = recorded(tmp_path / "run", wrong=wrong)
    found = hg.verify(run)
    assert not found.ok
    assert found.first_difference == 112
    assert "at step 112 (the 12 before it were not noted) differs" in str(found)
    with pytest.raises(hg.MismatchError, match=r"at step 112 \(the 12 before it were not noted\) differs"):
        hg.attribute(run, Rows(), check=False, progress=False)


def test_a_gradient_changed_after_the_last_noted_step_shows_in_the_state(tmp_path: Path) -> None:
    run = recorded(tmp_path / "run", wrong=118)
    found = hg.verify(run)
    assert not found.ok
    assert found.drift[STEPS] > 1e-3
    with pytest.raises(hg.MismatchError, match=r"is not what the recorded steps make .* at a step of which none was"):
        hg.attribute(run, Rows(), check=False, progress=False)


def test_changed_data_is_named_although_its_batch_was_not_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydragrad.attributing.worst_error", lambda *_: None)  # it would go through earlier steps first
    data = Rows()
    run = recorded(tmp_path / "run", data=data)
    noted = torch.cat([run.steps[t].batches[0] for t in (0, 112)]).tolist()
    t, example = next((t, i) for t in range(100, 112) for i in run.steps[t].batches[0].tolist() if i not in noted)
    data.x[example] += 1
    words = rf"content of the data changed: 1 of the {BATCH} examples at step {t} differ.* is example {example}\."
    with pytest.raises(hg.MismatchError, match=words):  # a sweep begins with the last steps
        hg.attribute(run, Rows(), check=False, progress=False)


def test_contents_are_told_where_they_are_always_the_same(tmp_path: Path) -> None:
    steps = recorded(tmp_path / "run").steps
    known, told = contents(steps, N)
    assert bool(told.all())
    for step in steps:
        for ids, digests in zip(step.batches, step.digests, strict=True):
            assert digests is None or torch.equal(known[ids], digests)
    other = steps[3].digests[0]
    assert other is not None
    changed = [*steps[:3], replace(steps[3], digests=(other + 1,)), *steps[4:]]
    assert sorted(steps[3].batches[0].tolist()) == (~contents(changed, N)[1]).nonzero().flatten().tolist()
    assert not bool(contents(steps[:0], N)[1].any())
