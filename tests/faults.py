"""A disk that fails, or a process that dies, at a chosen moment of writing."""

import builtins
import errno
import os
from collections.abc import Callable
from typing import Any

import pytest

from hydragrad import files, journal


class Disk:
    """Counts the moments of writing, and calls ``fault`` at the chosen ones.

    A moment: when half of a file's bytes are written, before it is synchronised, before it is renamed.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: Callable[[int], bool], fault: Callable[[], object]) -> None:
        self.moments, self._at, self._fault = 0, at, fault
        for module in (files, journal):
            monkeypatch.setattr(module, "open", self._open, raising=False)
        for name in ("fsync", "replace", "write"):
            self._wrap(monkeypatch, os, name)

    def moment(self) -> None:
        self.moments += 1
        if self._at(self.moments - 1):
            self._fault()

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            self.moment()
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    def _open(self, path: Any, mode: str) -> Any:
        file = builtins.open(path, mode)  # noqa: SIM115 (whoever asked closes it)
        return _File(file, self) if "r" not in mode or "+" in mode else file


class _File:
    """A file whose writing fails halfway."""

    def __init__(self, file: Any, disk: Disk) -> None:
        self._file, self._disk = file, disk

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: bytes) -> None:
        self._file.write(data[: len(data) // 2])
        self._file.flush()
        self._disk.moment()
        self._file.write(data[len(data) // 2 :])


def full() -> None:
    """What the system says of a full disk."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
