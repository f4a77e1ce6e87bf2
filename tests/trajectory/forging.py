"""Reading a store whole, and writing one whose hashes are right and whose content is not."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open

from hydragrad.errors import StoreError
from hydragrad.files import dumps, loads, sha256
from hydragrad.journal import sealed
from hydragrad.trajectory.format import encode_state, encode_steps
from hydragrad.trajectory.store import Trajectory

MANIFEST, JOURNAL = "manifest.json", "journal.jsonl"


def content(folder: Path) -> dict[str, Any]:
    """Everything that can be read from a store, in a form that compares."""
    run = Trajectory(folder)
    states = [encode_state(run.state(step)) for step in run.checkpoints]
    steps = [encode_steps([step]) for step in run.steps]
    return {"about": dumps(asdict(run.manifest)), "steps": steps, "states": states, "complete": run.complete}


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def tensor_files(folder: Path) -> list[str]:
    return [name for name in names(folder) if name.endswith(".safetensors")]


def refused_by_name(error: StoreError, folder: Path) -> None:
    """The message names a file of the store, or says that there is none."""
    kinds = (MANIFEST, JOURNAL, "steps/0000", "checkpoints/0000", f"no recorded run in {folder}")
    assert any(name in str(error) for name in kinds), error


def forge(folder: Path, manifest: bytes, entries: list[dict[str, Any]]) -> None:
    """Write manifest and journal with hashes that fit each other."""
    previous, lines = sha256(manifest), []
    (folder / MANIFEST).write_bytes(manifest)
    for entry in entries:
        lines.append(sealed({key: value for key, value in entry.items() if key not in ("previous", "seal")}, previous))
        previous = sha256(lines[-1])
    (folder / JOURNAL).write_bytes(b"".join(lines))


def pages(folder: Path) -> tuple[bytes, list[dict[str, Any]]]:
    entries = [loads(line) for line in (folder / JOURNAL).read_bytes().splitlines()]
    return (folder / MANIFEST).read_bytes(), entries


def replace_file(folder: Path, name: str, data: bytes) -> None:
    """Write a data file, and make the journal vouch for it."""
    (folder / name).write_bytes(data)
    manifest, entries = pages(folder)
    for entry in entries:
        for key in ("steps", "checkpoint"):
            if entry.get(key) and entry[key]["name"] == name:
                entry[key] |= {"size": len(data), "sha256": sha256(data)}
    forge(folder, manifest, entries)


def tables_of(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return loads(file.metadata()["tables"])
