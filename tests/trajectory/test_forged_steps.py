"""Draws, clips, skipped batches and autocast of a store, altered with hashes that fit: refused by the file's name."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils.data import DataLoader

from hydragrad.errors import StoreError
from hydragrad.files import dumps
from hydragrad.trajectory.recording import record
from hydragrad.trajectory.store import Trajectory
from tests.trajectory.loops import FEATURES, losses, make_data, make_model, sgd
from tests.trajectory.test_mutations import replace_file, tables_of

STEPS = "steps/00000000.safetensors"
Tensors = dict[str, torch.Tensor]
Tables = dict[str, Any]


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Dropout, clipping, bfloat16 and skipped batches that move BatchNorm's statistics, in one segment."""
    folder = tmp_path_factory.mktemp("forged") / "run"
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(FEATURES), nn.Dropout(0.3), *make_model())
    optimizer = sgd(model)
    with record(folder, model, optimizer) as recording:
        for place, batch in enumerate(recording.batches(DataLoader(make_data(), 4))):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.bfloat16):
                values = losses(model, batch).mean()
            values.backward()
            recording.clip_grad_norm_(model.parameters(), 0.5)
            if place != 2:
                optimizer.step()
    steps = Trajectory(folder).steps
    assert steps[0].draws[0]
    assert steps[0].clips
    assert steps[0].autocast[0] is not None
    assert steps[2].passes
    return folder


def at(name: str, place: tuple[int, ...], value: int) -> Callable[[Tensors, Tables], None]:
    def change(tensors: Tensors, tables: Tables) -> None:
        tensors[name][place] = value

    return change


def instead(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors, Tables], None]:
    def change(tensors: Tensors, tables: Tables) -> None:
        tensors[name] = make(tensors[name]).contiguous()

    return change


def clip(key: str, value: Any) -> Callable[[Tensors, Tables], None]:
    def change(tensors: Tensors, tables: Tables) -> None:
        next(row for row in tables["clips"] if row)[0][key] = value

    return change


def cast(place: int, value: Any) -> Callable[[Tensors, Tables], None]:
    def change(tensors: Tensors, tables: Tables) -> None:
        next(row for row in tables["autocast"] if row)[place] = value

    return change


def without(name: str) -> Callable[[Tensors, Tables], None]:
    def change(tensors: Tensors, tables: Tables) -> None:
        del tensors[name]

    return change


FORGERIES: dict[str, Callable[[Tensors, Tables], None]] = {
    "a draw of a state that is not there": at("draws", (0, 0), 99),
    "a draw that is none of the three kinds": at("draws", (0, 0), -3),
    "a draw that goes on from nowhere": at("draws", (0, 2), -1),
    "draws of fewer generators": instead("draws", lambda x: x[:, :3]),
    "draws of fewer batches": instead("draws", lambda x: x[:-1]),
    "draws of more batches": instead("draws", lambda x: torch.cat([x, x])),
    "draws as numbers with a fraction": instead("draws", lambda x: x.double() + 0.5),
    "states that are no bytes": instead("random_torch", lambda x: x.long()),
    "states that are no rows": instead("random_torch", lambda x: x.flatten()),
    "no states": without("random_torch"),
    "a clip of an unknown kind": clip("kind", "delete"),
    "a clip of nobody": clip("names", ("nobody",)),
    "a clip of numbers": clip("names", (1, 2)),
    "a clip's limit in words": clip("limit", "much"),
    "a clip's norm that is none": clip("norm_type", None),
    "a clip with an odd switch": clip("foreach", "yes"),
    "a clip with something more": clip("odd", 1),
    "a skipped batch behind its step": at("passes", (0, 2), 99),
    "a skipped batch before its step": at("passes", (0, 2), -1),
    "a skipped batch of a negative pass": at("passes", (0, 1), -1),
    "a skipped batch in modes that are not there": at("passes", (0, 3), 99),
    "a skipped batch under an autocast that is not there": at("passes", (0, 4), 99),
    "a skipped batch of another length": at("passes", (0, 0), 3),
    "a skipped batch of unknown examples": instead("passes_ids", lambda x: x + 10**6),
    "a skipped batch without a digest each": instead("passes_digests", lambda x: x[:-1]),
    "digests that are no numbers": instead("passes_digests", lambda x: x.double()),
    "no skipped batch where one is counted": without("passes"),
    "a step without its gradient's fingerprint": at("steps", (-1, -1), 0),
    "fingerprints of fewer steps": instead("fingerprints", lambda x: x[:-1]),
    "digests of fewer batches than are said": at("digests_of", (0,), 0),
    "autocast of integers": cast(1, "int64"),
    "autocast of something that torch has but is no dtype": cast(1, "load"),
    "autocast of an unknown device": cast(0, "nowhere"),
    "autocast with an odd cache": cast(2, "yes"),
    "autocast with an odd backward": cast(3, None),
    "an autocast that is not there": at("autocast", (0,), 99),
    "autocasts of fewer batches": instead("autocast", lambda x: x[:-1]),
    "a scale of nothing": instead("scales", lambda x: x * 0),
    "an infinite scale": instead("scales", lambda x: x * 0 + float("inf")),
    "scales of fewer steps": instead("scales", lambda x: x[:-1]),
}


@pytest.mark.parametrize("what", FORGERIES)
def test_forged_circumstances_of_steps_are_refused_by_name(what: str, recorded: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(recorded, tmp_path / "run"))
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / STEPS).items()}
    tables = tables_of(folder / STEPS)
    if "scale" in what and "fewer" not in what:
        tensors["scales"] = torch.ones_like(tensors["scales"])
    FORGERIES[what](tensors, tables)
    save_file(tensors, folder / STEPS, {"tables": dumps(tables)})
    replace_file(folder, STEPS, (folder / STEPS).read_bytes())
    with pytest.raises(StoreError, match=STEPS):
        Trajectory(folder)
