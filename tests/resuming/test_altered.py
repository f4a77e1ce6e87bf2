"""Altered and forged pieces are refused by name."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import hydragrad as hg
from hydragrad.files import loads, sha256
from hydragrad.journal import sealed
from hydragrad.resuming import _BEFORE
from tests.resuming.pieces import FIXED, JOURNAL, asked, contents


def test_an_altered_piece_is_refused_by_name(run: hg.Run, begun: Path, tmp_path: Path) -> None:
    chance = random.Random(0)
    pieces = sorted(name for name in contents(begun) if name.startswith("pieces/"))[:3]
    for number in range(40):
        folder = Path(shutil.copytree(begun, tmp_path / f"{number}"))
        name = chance.choice(pieces)
        path, data = folder / name, bytearray((folder / name).read_bytes())
        way = number % 5
        if way == 0:
            path.unlink()
        elif way == 1:
            path.write_bytes(data[: chance.randrange(len(data))])
        elif way == 2:
            shutil.copy(folder / chance.choice([p for p in pieces if p != name]), path)
        elif way == 3:
            path.unlink()
            path.symlink_to(begun / name)
        else:
            data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
            path.write_bytes(data)
        with pytest.raises(hg.StoreError, match=rf"{name} (is missing|has the wrong|was altered|lies outside)"):
            asked(run, folder)
        assert not (folder / "sweep.lock").exists()


def test_an_altered_journal_is_refused(run: hg.Run, begun: Path, tmp_path: Path) -> None:
    chance, data = random.Random(0), (begun / JOURNAL).read_bytes()
    folder = Path(shutil.copytree(begun, tmp_path / "pieces"))
    for _ in range(60):
        place = chance.randrange(len(data))
        (folder / JOURNAL).write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(hg.StoreError, match=r"sweep\.jsonl"):
            asked(run, folder)


@pytest.mark.parametrize(
    "altered",
    [
        {"format": 9}, {"plan": None}, {"plan": {"engine": "plain:x"}}, {"question": 3},
        {"plan": {**vars(FIXED), "block": 0}},
        {"plan": {**vars(FIXED), "carried": "3"}}, {"plan": {**vars(FIXED), "engine": "os.system"}},
    ],
)  # fmt: skip
def test_a_forged_plan_is_refused(altered: dict[str, Any], run: hg.Run, begun: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "pieces"))
    first = loads((folder / JOURNAL).read_bytes().splitlines()[0])
    entry = {key: value for key, value in {**first, **altered}.items() if key not in ("previous", "seal")}
    (folder / JOURNAL).write_bytes(sealed(entry, _BEFORE))
    with pytest.raises(hg.HydragradError, match=r"sweep\.jsonl cannot be read|no engine 'os\.system'"):
        asked(run, folder)


def test_a_forged_piece_is_refused_or_has_its_shape(run: hg.Run, begun: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(begun, tmp_path / "pieces"))
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    entry = {key: value for key, value in loads(lines[1]).items() if key not in ("previous", "seal")}
    other = {key: value for key, value in loads(lines[2]).items() if key not in ("previous", "seal")}
    for piece, about in (
        (entry["piece"], {**entry["about"], "columns": [0, 2]}),
        (other["piece"], entry["about"]),
        (None, entry["about"]),
        (entry["piece"], {"columns": [0, 3]}),
        ({**entry["piece"], "name": "../pieces/00000000.safetensors"}, entry["about"]),
        (entry["piece"], {**entry["about"], "growth": "x"}),
    ):
        (folder / JOURNAL).write_bytes(lines[0] + sealed({"piece": piece, "about": about}, sha256(lines[0])))
        try:
            scores = asked(run, folder)
        except hg.StoreError as error:
            assert "sweep.jsonl" in str(error) or "pieces/" in str(error)  # noqa: PT017
        else:  # columns that no plan has: not taken
            assert about["columns"] == [0, 2]
            assert torch.equal(scores.values, asked(run, begun).values)
