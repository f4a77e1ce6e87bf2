"""Recordings whose process died go on where their loop stood, and end as if nothing had happened."""

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, WeightedRandomSampler

from hydragrad.attributing import attribute
from hydragrad.errors import HydragradError, MismatchError, StoreError, UnsupportedError
from hydragrad.run import Run
from hydragrad.trajectory.augmentation import Augmented
from hydragrad.trajectory.format import encode_state, encode_steps
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.resuming import Resumption
from hydragrad.trajectory.store import Trajectory
from hydragrad.verification import verify
from tests.children import PATIENCE, ended, fork, kill
from tests.tolerances import SAME, assert_close
from tests.trajectory.loops import FEATURES, N, bind, losses, make_data, make_model, sgd
from tests.trajectory.test_augmentation import Noisy
from tests.trajectory.test_killed import wait_for_lines

EPOCHS, EVERY = 6, 3


def dropping() -> nn.Module:
    """The ordinary model with BatchNorm and dropout."""
    layers = list(make_model())
    return nn.Sequential(nn.BatchNorm1d(FEATURES), *layers[:2], nn.Dropout(0.3), layers[2])


def noisy_losses(model: nn.Module, batch: Any) -> Tensor:
    """With draws of numpy and Python in the loss."""
    return losses(model, batch) * (1 + 0.1 * np.random.standard_normal() + 0.1 * random.gauss(0, 1))


def seeded_loader(data: Any) -> DataLoader:
    return DataLoader(data, 5, shuffle=True, generator=torch.Generator().manual_seed(2))


def weighted_loader(data: Any) -> DataLoader:
    sampler = WeightedRandomSampler([1.0] * N, N, generator=torch.Generator().manual_seed(4))
    return DataLoader(data, 5, sampler=sampler)


KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"model": dropping},
    "noise": {"loss": noisy_losses},
    "global-shuffle": {"loader": lambda data: DataLoader(data, 5, shuffle=True), "model": dropping},
    "workers": {"loader": lambda data: DataLoader(data, 5, shuffle=True, num_workers=1)},
    "sampler": {"loader": weighted_loader},
    "augmented": {"data": lambda: Augmented(Noisy())},
    "adam": {"optimizer": lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)},
    "tensors": {
        "optimizer": lambda model: torch.optim.AdamW(
            model.parameters(), lr=torch.tensor(0.01), betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False
        )
    },
    "by-step": {"schedule": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.2, total_steps=60), "by_step": True},
    "by-epoch": {"schedule": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [1, 3])},
    "accumulated": {"together": 2, "model": dropping},
}


class StopHere(Exception):  # noqa: N818 (no error: where a loop ends)
    """The loop ends here."""


def whole_loop(folder: Path, kind: str, *, on_step: Callable[[int], object] = lambda step: None) -> Resumption:
    """A training that is always started in the same way, and goes on with what is there."""
    options = KINDS[kind]
    torch.manual_seed(1)
    np.random.seed(2)
    random.seed(3)
    model: nn.Module = options.get("model", make_model)()
    optimizer: Optimizer = options.get("optimizer", sgd)(model)
    schedule = options["schedule"](optimizer) if "schedule" in options else None
    loader = options.get("loader", seeded_loader)(options.get("data", make_data)())
    states = {} if schedule is None else {"schedule": schedule}
    loss, together = options.get("loss", losses), options.get("together", 1)
    with record(folder, model, optimizer, checkpoint_every=EVERY, resume=True, states=states) as recording:
        where = recording.restore()
        step = where.step
        for epoch in range(where.epoch, EPOCHS):
            place = where.batch if epoch == where.epoch else 0
            for batch in recording.batches(loader):
                place += 1
                loss(model, batch).mean().backward()
                if place % together:
                    continue
                optimizer.step()
                optimizer.zero_grad()
                step += 1
                on_step(step)
                if schedule is not None and "by_step" in options:
                    schedule.step()
                torch.rand(1)
                np.random.rand()  # a loop that draws by itself
            if schedule is not None and "by_step" not in options:
                schedule.step()
            optimizer.zero_grad()
    return where


def bound(folder: Path, kind: str) -> Run:
    options = KINDS[kind]
    model, data = options.get("model", make_model)(), options.get("data", make_data)()
    return bind(folder, model=model, loss=options.get("loss", losses), data=data)


def content(folder: Path) -> dict[str, Any]:
    """All that is recorded, in a form that compares."""
    run = Trajectory(folder)
    states = {step: encode_state(run.state(step)) for step in run.checkpoints}
    return {"steps": [encode_steps([step]) for step in run.steps], "states": states, "complete": run.complete}


def stopping(at: int) -> Callable[[int], object]:
    def on_step(step: int) -> None:
        if step == at:
            raise StopHere

    return on_step


@pytest.mark.filterwarnings("ignore:This DataLoader")
@pytest.mark.parametrize("kind", KINDS)
def test_runs_that_stopped_anywhere_go_on_and_end_bit_for_bit_the_same(kind: str, tmp_path: Path) -> None:
    whole_loop(tmp_path / "whole", kind)
    expected = content(tmp_path / "whole")
    last = len(expected["steps"])
    moments = {1, 2, 3, 4, 5, 6, 9, 10, 14, last - 1, last} if kind != "workers" else {4, 9, 14}
    for at in sorted(at for at in moments if at <= last):
        folder = tmp_path / f"{at}"
        with pytest.raises(StopHere):
            whole_loop(folder, kind, on_step=stopping(at))
        assert not Trajectory(folder).complete
        where = whole_loop(folder, kind)
        # The loop's place at a stored state is known once the loop has come back for more.
        assert where.step == (at - 1) // EVERY * EVERY
        assert where.step + where.dropped == at
        assert content(folder) == expected
        assert Trajectory(folder).resumptions == ((where.step, where.dropped),)
        found = verify(bound(folder, kind))
        # Of "accumulated" the last batch is left over: it moved running statistics after the last step.
        assert found.exact == (kind != "accumulated"), found
        assert found.first_difference is None
        assert not any(found.drift.values())
        assert any(f"gone on with at step {where.step}" in reason for reason in found.reasons)


def test_recordings_killed_at_fifty_random_moments_go_on(tmp_path: Path) -> None:
    kind, chooser, begun = "dropout", random.Random(1), list[int]()
    whole_loop(tmp_path / "whole", kind)
    expected = content(tmp_path / "whole")
    last = len(expected["steps"]) - 1

    def slow(step: int) -> None:  # the last waits to be killed, late as that may be
        time.sleep(0.001 if step < last else PATIENCE)

    for attempt in range(25):
        folder, lines = tmp_path / f"{attempt}", chooser.randrange(2, 10)
        for _ in range(2):  # each is killed twice
            child = fork(lambda folder=folder: whole_loop(folder, kind, on_step=slow))
            wait_for_lines(folder, lines)
            time.sleep(chooser.uniform(0, 0.006))
            assert kill(child) == -9
            begun.append(Trajectory(folder).points[-1])
            lines = min((folder / "journal.jsonl").read_bytes().count(b"\n") + chooser.randrange(1, 5), 16)
        where = whole_loop(folder, kind)
        assert where.step == begun[-1]
        assert content(folder) == expected
        assert Trajectory(folder).resumptions[-1] == (where.step, where.dropped)
        if attempt % 8 == 0:
            assert verify(bound(folder, kind)).exact
            here, there = (attribute(bound(f, kind), make_data(3), check=False) for f in (folder, tmp_path / "whole"))
            assert_close(here.values, there.values, SAME)
    assert len(set(begun)) > 3, begun  # of the six stored states before the end


def test_a_recording_that_dies_while_it_is_taken_up_again_can_be_taken_up(tmp_path: Path) -> None:
    whole_loop(tmp_path / "whole", "plain")
    with pytest.raises(StopHere):
        whole_loop(tmp_path / "run", "plain", on_step=stopping(8))
    for at in (7, 11, 17):
        assert ended(fork(lambda at=at: whole_loop(tmp_path / "run", "plain", on_step=dying(at)))) == 9
    whole_loop(tmp_path / "run", "plain")
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert [step for step, _ in Trajectory(tmp_path / "run").resumptions] == [6, 6, 9, 15]


@pytest.mark.parametrize(
    ("name", "begun"),
    [("checkpoints/00000009", 6), ("points/00000009", 6), ("steps/00000003", 3), ("points/00000003", 0)],
)
def test_a_recording_that_lost_files_with_the_power_goes_on_before_them(name: str, begun: int, tmp_path: Path) -> None:
    whole_loop(tmp_path / "whole", "plain")
    folder = tmp_path / "run"
    assert ended(fork(lambda: whole_loop(folder, "plain", on_step=dying(11)))) == 9
    (folder / f"{name}.safetensors").write_bytes(b"")
    assert whole_loop(folder, "plain").step == begun
    assert content(folder) == content(tmp_path / "whole")
    assert Trajectory(folder).complete
    assert verify(bound(folder, "plain")).exact


def dying(at: int) -> Callable[[int], object]:
    return lambda step: os._exit(9) if step == at else None


def test_a_loop_with_checkpoints_of_its_own_is_found_in_the_run(tmp_path: Path) -> None:
    """It keeps model, optimizer and loader after every epoch (of 5 steps) and puts them back by itself."""

    def loop(folder: Path, stop: int | None, saved: dict[str, Any]) -> None:
        model, generator = make_model(), torch.Generator().manual_seed(2)
        optimizer = sgd(model)
        loader = DataLoader(make_data(), 5, shuffle=True, generator=generator)
        if saved:
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            generator.set_state(saved["generator"])
        with record(folder, model, optimizer, checkpoint_every=5, resume=True) as recording:
            for epoch in range(saved.get("epoch", 0), 4):
                for place, batch in enumerate(recording.batches(loader)):
                    if (epoch, place) == (stop, 3):
                        raise StopHere
                    optimizer.zero_grad()
                    losses(model, batch).mean().backward()
                    optimizer.step()
                saved["model"] = {k: v.clone() for k, v in model.state_dict().items()}
                held = optimizer.state_dict()
                held["state"] = {k: {n: v.clone() for n, v in s.items()} for k, s in held["state"].items()}
                saved |= {"optimizer": held, "generator": generator.get_state(), "epoch": epoch + 1}

    loop(tmp_path / "whole", None, {})
    saved: dict[str, Any] = {}
    with pytest.raises(StopHere):
        loop(tmp_path / "run", 2, saved)
    loop(tmp_path / "run", None, saved)
    assert content(tmp_path / "run") == content(tmp_path / "whole")
    assert Trajectory(tmp_path / "run").resumptions == ((10, 3),)
    assert verify(bind(tmp_path / "run")).exact


@pytest.fixture
def stopped(tmp_path: Path) -> Path:
    with pytest.raises(StopHere):
        whole_loop(tmp_path / "run", "plain", on_step=stopping(8))
    return tmp_path / "run"


def untouched(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_another_model_optimizer_or_argument_is_refused_and_nothing_changed(stopped: Path) -> None:
    kept, wide = untouched(stopped), nn.Sequential(nn.Linear(FEATURES, 4), nn.Tanh(), nn.Linear(4, 3))
    model, deeper = make_model(), nn.Sequential(make_model(), nn.Linear(3, 3))
    cases: list[tuple[nn.Module, Optimizer, dict[str, Any], str]] = [
        (wide, sgd(wide), {}, "params differs"),
        (deeper, sgd(deeper), {}, "params differs"),
        (model, torch.optim.Adam(model.parameters()), {}, "optimizer differs"),
        (model, sgd(model), {"checkpoint_every": 4}, "checkpoint_every differs"),
        (model, sgd(model), {"reduction": "mean"}, "reduction differs"),
    ]
    for other, optimizer, changes, told in cases:
        for restoring in (True, False):
            options = {"checkpoint_every": EVERY, "resume": True, **changes}
            with pytest.raises(MismatchError, match=told), record(stopped, other, optimizer, **options) as recording:
                recording.restore() if restoring else next(iter(recording.batches(seeded_loader(make_data()))))
            assert untouched(stopped) == kept


def test_a_state_that_is_nowhere_in_the_run_is_refused(stopped: Path) -> None:
    kept, model = untouched(stopped), make_model()
    with torch.no_grad():
        dict(model.named_parameters())["0.bias"].add_(1e-6)
    with (
        pytest.raises(
            MismatchError, match=r"stand at no stored state.*\[0, 3, 6\].*nearest to that of step 0.*restore"
        ),
        record(stopped, model, sgd(model), checkpoint_every=EVERY, resume=True) as recording,
    ):
        next(iter(recording.batches(seeded_loader(make_data()))))
    assert untouched(stopped) == kept


def goes_on(folder: Path, loader: DataLoader, *, resume: bool = True, stop_at: int | None = None) -> None:
    model = make_model()
    optimizer = sgd(model)
    with record(folder, model, optimizer, checkpoint_every=EVERY, resume=resume) as recording:
        if resume:
            assert recording.restore().step == 6
        for place, batch in enumerate(recording.batches(loader)):
            losses(model, batch).mean().backward()
            optimizer.step()
            if place == stop_at:
                raise StopHere


def test_other_data_or_another_order_is_refused(stopped: Path) -> None:
    for loader, told in (
        (seeded_loader(make_data(N + 1)), r"data_length differs|does not give the batches again"),
        (DataLoader(make_data(), 5), r"other generators of its own"),
        (DataLoader(make_data(), 6, generator=torch.Generator()), r"does not give the batches again"),
    ):
        with pytest.raises(MismatchError, match=told):
            goes_on(stopped, loader)
    whole_loop(stopped, "plain")  # and still there
    assert Trajectory(stopped).complete


def test_a_finished_run_and_one_that_cannot_tell_are_refused(tmp_path: Path) -> None:
    whole_loop(tmp_path / "run", "plain")
    kept = untouched(tmp_path / "run")
    with pytest.raises(StoreError, match=r"is finished.*whole run of 30 steps.*hydragrad\.load"):
        whole_loop(tmp_path / "run", "plain")
    assert untouched(tmp_path / "run") == kept
    with pytest.raises(StopHere):
        goes_on(tmp_path / "other", seeded_loader(make_data()), resume=False, stop_at=4)
    with pytest.raises(StoreError, match=r"does not say where its loop stood.*resume=True\) from its beginning"):
        whole_loop(tmp_path / "other", "plain")


def test_a_run_that_is_being_recorded_is_not_gone_on_with(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def work() -> None:
        def wait(step: int) -> None:
            if step == 8:
                (tmp_path / "started").touch()
                time.sleep(PATIENCE)

        whole_loop(folder, "plain", on_step=wait)

    child = fork(work)
    while not (tmp_path / "started").exists():
        time.sleep(0.002)
    with pytest.raises(StoreError, match=rf"recorded into by another.*{child}"):
        whole_loop(folder, "plain")
    assert kill(child) == -9
    assert whole_loop(folder, "plain").step in (3, 6)  # 3 where the segment up to 6 was still being written


def test_what_makes_no_sense_is_refused(tmp_path: Path, stopped: Path) -> None:
    model = make_model()
    with pytest.raises(UnsupportedError, match="contradict each other"):
        record(tmp_path / "x", model, sgd(model), resume=True, overwrite=True)
    with pytest.raises(UnsupportedError, match=r"states: 'odd' cannot be put back.*state_dict"):
        record(tmp_path / "x", model, sgd(model), resume=True, states={"odd": 3})
    with record(tmp_path / "new", model, sgd(model)) as recording, pytest.raises(HydragradError, match="nothing to"):
        recording.restore()
    optimizer = sgd(model)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    with (
        pytest.raises(MismatchError, match=r"other objects are to be put back.*states=\[\].*'schedule'"),
        record(stopped, model, optimizer, checkpoint_every=EVERY, resume=True, states={"schedule": schedule}) as again,
    ):
        again.restore()
