"""Stores altered in two hundred seeded ways: refused by name, or read exactly as recorded; never a crash, never code.

`damage` changes bytes and knows no hashes. `forgery` writes new hashes as well, as an attacker would: then what is read
need not be what was recorded, but it must make sense, and nothing but a refusal may come of it if it does not.
"""

import os
import random
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from hydragrad.errors import HydragradError, StoreError
from hydragrad.files import dumps, loads, sha256
from hydragrad.trajectory.store import Trajectory
from tests.trajectory.forging import (
    JOURNAL,
    MANIFEST,
    content,
    forge,
    names,
    pages,
    refused_by_name,
    replace_file,
    tables_of,
    tensor_files,
)
from tests.trajectory.loops import bind

EACH = 14  # mutants of each of the eleven kinds of damage; four times as many of each of the four kinds of forgery


def is_prefix(part: dict[str, Any], whole: dict[str, Any]) -> bool:
    """What a killed recording leaves, which says that it is one."""
    cut = {key: whole[key][: len(part[key])] for key in ("steps", "states")}
    return part == {**whole, **cut, "complete": False}


# ---------------------------------------------------------------------------------------------------------------
# Damage: what is read is what was recorded, or nothing is


def flip(folder: Path, chance: random.Random, other: Path) -> None:
    path = folder / chance.choice(names(folder))
    data = bytearray(path.read_bytes())
    data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
    path.write_bytes(data)


def truncate(folder: Path, chance: random.Random, other: Path) -> None:
    path = folder / chance.choice(names(folder))
    path.write_bytes(path.read_bytes()[: chance.randrange(path.stat().st_size)])


def lose(folder: Path, chance: random.Random, other: Path) -> None:
    for name in chance.sample(names(folder), chance.randint(1, 2)):
        (folder / name).unlink()


def swap(folder: Path, chance: random.Random, other: Path) -> None:
    a, b = (folder / name for name in chance.sample(names(folder), 2))
    first = a.read_bytes()
    a.write_bytes(b.read_bytes())
    b.write_bytes(first)


def shuffle_journal(folder: Path, chance: random.Random, other: Path) -> None:
    lines = (folder / JOURNAL).read_bytes().splitlines(keepends=True)
    a, b = chance.sample(range(len(lines)), 2)
    kind = chance.randrange(4)
    if kind == 0:
        lines[a], lines[b] = lines[b], lines[a]
    elif kind == 1:
        lines.insert(a, lines[b])
    elif kind == 2:
        del lines[a]
    else:
        lines[a] = lines[a].replace(b"\n", b"")
    (folder / JOURNAL).write_bytes(b"".join(lines))


def edit_number(folder: Path, chance: random.Random, other: Path) -> None:
    path = folder / chance.choice([MANIFEST, JOURNAL])
    text = path.read_text()
    found = chance.choice(list(re.finditer(r"(?<=[:,\[])\d+(?=[,}\]])", text)))
    number = chance.choice([str(int(found[0]) + 1), "-1", "1e999", "9" * 5000, "NaN", "null", "0.5", str(2**64)])
    path.write_text(text[: found.start()] + number + text[found.end() :])


def append(folder: Path, chance: random.Random, other: Path) -> None:
    path = folder / chance.choice(names(folder))
    path.write_bytes(path.read_bytes() + chance.choice([b"\0", b"\n", b"{}\n", b"\n{", b"[" * 5000, path.read_bytes()]))


def absurd_header(folder: Path, chance: random.Random, other: Path) -> None:
    path = folder / chance.choice(tensor_files(folder))
    size = chance.choice([0, 1, 2**31, 2**63, 2**64 - 1, path.stat().st_size])
    path.write_bytes(struct.pack("<Q", size) + path.read_bytes()[8:])


def empty(folder: Path, chance: random.Random, other: Path) -> None:
    (folder / chance.choice(names(folder))).write_bytes(b"")


def foreign(folder: Path, chance: random.Random, other: Path) -> None:
    for name in chance.sample(names(folder), chance.randint(1, 3)):
        if (folder / name).read_bytes() != (other / name).read_bytes():
            shutil.copy(other / name, folder / name)


def link(folder: Path, chance: random.Random, other: Path) -> None:
    path = folder / chance.choice(names(folder))
    path.unlink()
    kind = chance.randrange(4)
    if kind == 0:
        path.mkdir()
    else:
        path.symlink_to([path, other / path.relative_to(folder), "/dev/zero"][kind - 1])


DAMAGE = [
    flip, truncate, lose, swap, shuffle_journal, edit_number, append, absurd_header, empty, foreign, link,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda f: f.__name__)
def test_a_damaged_store_is_refused_by_name_or_read_as_recorded(
    damage: Callable[..., None], recorded: Path, other: Path, tmp_path: Path
) -> None:
    whole, chance, refusals = content(recorded), random.Random(damage.__name__), 0
    for number in range(EACH):
        folder = Path(shutil.copytree(recorded, tmp_path / f"{number}"))
        damage(folder, chance, other)
        try:
            found = content(folder)
        except StoreError as refused:  # anything else fails the test, as what it is
            refusals += 1
            refused_by_name(refused, folder)
        else:
            assert found == whole or is_prefix(found, whole), f"{damage.__name__} {number} was accepted"
            if found != whole:  # only the end of the journal may be missing
                assert names(folder) == names(recorded)
                assert (recorded / JOURNAL).read_bytes().startswith((folder / JOURNAL).read_bytes()[:-1])
    assert refusals >= EACH // 2, refusals


def test_every_flipped_byte_of_the_journal_is_found(folder: Path, recorded: Path) -> None:
    """Its last line has no line after it that would hold its hash."""
    data = (recorded / JOURNAL).read_bytes()
    for place in range(len(data)):
        (folder / JOURNAL).write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
        with pytest.raises(StoreError, match=r"journal\.jsonl"):
            Trajectory(folder)


# ---------------------------------------------------------------------------------------------------------------
# Forgery: hashes are right, content is not

ODD = [
    None, True, -1, 0, 2**31, 2**63, 2**200, 1e308, float("nan"), float("inf"), 0.5, "", "x", "\0", "../../etc/passwd",
    "/etc/passwd", "load", "float32", [], {}, [[]], [1, "a"], (), (1,), {"a": {}}, [-1], [2**62, 2**62], {"end": True},
]  # fmt: skip


def alter(value: Any, chance: random.Random) -> Any:
    """The value with one part at random replaced by something odd, dropped or doubled."""
    if isinstance(value, (dict, list, tuple)) and value and chance.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key, parts = chance.choice(keys), value.copy() if isinstance(value, dict) else list(value)
        way = chance.random()
        if way < 0.1:
            del parts[key]
        elif way < 0.2:
            parts.update({"odd": chance.choice(ODD)}) if isinstance(parts, dict) else parts.append(parts[key])
        else:
            parts[key] = alter(parts[key], chance)
        return tuple(parts) if isinstance(value, tuple) else parts
    return chance.choice(ODD)


def forge_manifest(folder: Path, chance: random.Random) -> None:
    manifest, entries = pages(folder)
    altered = alter(loads(manifest), chance)
    forge(folder, (dumps(altered) + "\n").encode(), entries)


def forge_journal(folder: Path, chance: random.Random) -> None:
    manifest, entries = pages(folder)
    place = chance.randrange(len(entries))
    altered = alter(entries[place], chance)
    entries[place] = altered if isinstance(altered, dict) else {"odd": altered}
    forge(folder, manifest, entries)


def forge_tensors(folder: Path, chance: random.Random) -> None:
    name = chance.choice(tensor_files(folder))
    tensors, tables = load_file(folder / name), tables_of(folder / name)
    key = chance.choice(sorted(tensors))
    old = tensors[key]
    new = chance.choice(
        [
            old.double() * 0.5, old.to(torch.bool), old[..., :-1], old[:0], old.reshape(1, *old.shape), old.long() - 7,
            torch.full_like(old.long(), 2**62), torch.full(old.shape, float("nan")), torch.tensor(3),
            torch.cat([old, old]), None,
        ] if old.dim() else [torch.zeros(2), torch.tensor(True), None]
    )  # fmt: skip
    tensors.pop(key)
    if new is not None:
        tensors[chance.choice([key, key, key, key, "optimizer:x", "odd:y", "param:z"])] = new.contiguous()
    save_file(tensors, folder / name, {"tables": dumps(tables)})
    replace_file(folder, name, (folder / name).read_bytes())


def forge_tables(folder: Path, chance: random.Random) -> None:
    name = chance.choice(tensor_files(folder))
    altered: Any = alter(tables_of(folder / name), chance)
    metadata = {
        "tables": chance.choice([dumps(altered)] * 6 + ["", "[" * 9000, '{"$tuple":1}', '{"$float":[]}', "NaN"])
    }
    save_file(load_file(folder / name), folder / name, chance.choice([metadata] * 6 + [{"x": ""}, None]))
    replace_file(folder, name, (folder / name).read_bytes())


@pytest.mark.parametrize(
    "forgery", [forge_manifest, forge_journal, forge_tensors, forge_tables], ids=lambda f: f.__name__
)
def test_a_forged_store_is_refused_or_makes_sense(forgery: Callable[..., None], recorded: Path, tmp_path: Path) -> None:
    chance, refusals = random.Random(forgery.__name__), 0
    for number in range(4 * EACH):
        folder = Path(shutil.copytree(recorded, tmp_path / f"{number}"))
        forgery(folder, chance)
        try:
            content(folder)
        except StoreError as refused:
            refusals += 1
            refused_by_name(refused, folder)
            continue
        try:  # types and ranges are right: then it binds, or is refused as another run
            bind(folder)
        except HydragradError:
            refusals += 1
    assert refusals >= EACH, refusals


def test_a_forged_journal_reads_no_file_outside_the_folder(folder: Path, other: Path) -> None:
    manifest, entries = pages(folder)
    place = other / "steps" / "00000000.safetensors"
    data = place.read_bytes()
    honest = entries[1]["steps"]
    for name in (str(place), "../other/steps/00000000.safetensors", "steps/../../other/steps/00000000.safetensors"):
        entries[1]["steps"] = {"name": name, "size": len(data), "sha256": sha256(data)}
        forge(folder, manifest, entries)
        with pytest.raises(StoreError, match=r"journal\.jsonl names a file that it cannot hold"):
            Trajectory(folder)
    entries[1]["steps"] = {**honest, "size": len(data), "sha256": sha256(data)}
    forge(folder, manifest, entries)
    (folder / honest["name"]).unlink()
    (folder / honest["name"]).symlink_to(place)
    with pytest.raises(StoreError, match=r"steps/00000000.safetensors lies outside its folder"):
        Trajectory(folder)
    shutil.copy(place, tmp := folder / "steps" / "copy")
    os.replace(tmp, folder / honest["name"])
    assert len(Trajectory(folder)) == 10  # the same bytes within the folder are taken: it was the place
