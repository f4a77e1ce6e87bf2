"""An append-only journal of sealed lines, and the files it vouches for: what a kill or an edit leaves can be told."""

import contextlib
import os
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

from hydragrad.errors import StoreError, message
from hydragrad.files import broken_file, dumps, loads, read_bytes, sha256, write_atomically, writing

Entry = dict[str, Any]

_NAME = re.compile(r"[a-z]+/[0-9]{8,20}\.safetensors")
_SEAL = re.compile(rb'(?P<body>.*),"seal":"(?P<seal>[0-9a-f]{64})"\}', re.DOTALL)


@final
@dataclass(frozen=True)
class FileRef:
    """A file that a journal vouches for: name inside its folder, size, hash."""

    name: str
    size: int
    sha256: str

    @staticmethod
    def write(folder: Path, name: str, data: bytes, *, durable: bool = True) -> "FileRef":
        """Write the file and return what vouches for it."""
        write_atomically(folder / name, data, durable=durable)
        return FileRef(name, len(data), sha256(data))

    @staticmethod
    def of(described: Any, journal: Path) -> "FileRef":
        """From a journal's entry; refused unless it names a data file below the journal's own folder."""
        if (
            not isinstance(described, dict)
            or set(described) != {"name", "size", "sha256"}
            or not isinstance(described["name"], str)
            or not isinstance(described["sha256"], str)
            or type(described["size"]) is not int
            or not _NAME.fullmatch(described["name"])
        ):
            raise StoreError(
                broken_file(journal, "names a file that it cannot hold", "folder/NNNNNNNN.safetensors", repr(described))
            )
        return FileRef(**described)

    def to_dict(self) -> dict[str, Any]:
        """For the journal."""
        return asdict(self)

    def whole(self, folder: Path) -> bool:
        """Whether the file is there, as long as it was written; what cannot be looked at is for ``check_size``."""
        try:
            return (folder / self.name).stat().st_size == self.size
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError:
            return True

    def check_size(self, folder: Path) -> None:
        """Refuse a missing or truncated file, or a link out of the folder, by name (cheap: nothing is read)."""
        path = folder / self.name
        try:
            present, inside = path.is_file(), path.resolve().is_relative_to(folder.resolve())
            size = path.stat().st_size if present else 0
        except (OSError, RuntimeError) as error:  # a folder without permission; links in a circle
            raise StoreError(broken_file(path, "cannot be read", f"a file of {self.size} bytes", str(error))) from error
        if not present:
            raise StoreError(broken_file(path, "is missing", f"a file of {self.size} bytes", "nothing"))
        if not inside:
            raise StoreError(broken_file(path, "lies outside its folder", "a file", f"a link to {path.resolve()}"))
        if size != self.size:
            raise StoreError(broken_file(path, "has the wrong size", f"{self.size} bytes", f"{size} bytes"))

    def read(self, folder: Path) -> bytes:
        """The file's bytes; refused by name if they are not what was written."""
        self.check_size(folder)
        data = read_bytes(folder / self.name)
        if sha256(data) != self.sha256:
            raise StoreError(broken_file(folder / self.name, "was altered", f"SHA-256 {self.sha256}", sha256(data)))
        return data


def sealed(entry: Entry, previous: str) -> bytes:
    """A journal's line: the entry, the hash of what precedes it, and the hash of the line itself."""
    body = dumps({**entry, "previous": previous})[:-1].encode()
    return body + b',"seal":"' + sha256(body).encode() + b'"}\n'


@final
class Journal:
    """Appends sealed lines behind the first ``length`` bytes of ``path``, whose last line has the hash ``previous``."""

    def __init__(self, path: Path, previous: str, length: int = 0) -> None:
        self.path, self._previous, self._length = path, previous, length

    @staticmethod
    def after(path: Path, written: bytes) -> "Journal":
        """Behind the whole lines that ``read_journal`` gave."""
        return Journal(path, sha256(written[written[:-1].rfind(b"\n") + 1 :]), len(written))

    def append(self, entry: Entry, *, durable: bool = True) -> None:
        """Append a line, or nothing: where the disk is full the journal stays as long as it was. Raises StoreError."""
        line = sealed(entry, self._previous)
        with writing(self.path), open(self.path, "r+b" if self._length else "wb") as journal:
            try:
                journal.truncate(self._length)  # what a kill or a full disk left of a line
                journal.seek(self._length)
                journal.write(line)
                journal.flush()
                if durable:
                    os.fsync(journal.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    os.ftruncate(journal.fileno(), self._length)
                raise
        self.wrote(line)

    def wrote(self, line: bytes) -> None:
        """Count a line that was written in another way (a staged first line)."""
        self._previous, self._length = sha256(line), self._length + len(line)


def read_journal(path: Path, previous: str, precedes: str) -> tuple[list[Entry], bytes]:
    """The entries, and the bytes they came from; ``previous``: the hash of what the first line must follow from.

    A last line without its newline is a kill's trace and is dropped; any other line that is not as it was written, or
    does not follow from the one before (the first: from ``precedes``), raises StoreError with its number.
    """
    data = read_bytes(path)
    *lines, torn = data.split(b"\n")
    entries: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        entry = _unsealed(line)
        if entry is None:
            raise StoreError(
                broken_file(path, f"was altered in line {number}", "a line as it was written", repr(line[:80]))
            )
        if entry.pop("previous") != previous:
            raise StoreError(
                message(
                    f"line {number} of {path} does not follow from what precedes it",
                    expected=f"the hash of {precedes if number == 1 else f'line {number - 1}'}",
                    cause=f"{path.name} or {precedes} was edited or swapped",
                    remedy="copy the folder again, or make it anew",
                )
            )
        entries.append(entry)
        previous = sha256(line + b"\n")
    if _unsealed(torn[:-1]) is not None:  # whole, and then something that is not its newline: no kill does that
        raise StoreError(broken_file(path, "was altered at its end", "a newline", repr(torn[-1:])))
    if not entries:
        raise StoreError(broken_file(path, "is empty", "at least one whole line", f"{len(data)} bytes"))
    return entries, data[: len(data) - len(torn)]


def _unsealed(line: bytes) -> Entry | None:
    """The entry of a line whose seal is right."""
    found = _SEAL.fullmatch(line)
    if not found or sha256(found["body"]) != found["seal"].decode():
        return None
    try:
        entry = loads(found["body"] + b"}")
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and "previous" in entry else None
