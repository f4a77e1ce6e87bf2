"""One writer per folder: a lock file that names its holder, and is taken over from a holder that died."""

import os
import socket
import time
from pathlib import Path
from typing import final

from hydragrad.errors import StoreError, message
from hydragrad.files import dumps, loads, writing

_FILLING = 10.0
"""Seconds after which a lock without a holder's name is a dead process's: it is filled right after it was created,
which may take a second or two on a machine that others keep busy."""


@final
class Lock:
    """Held from its making to ``free``; raises StoreError while a living process holds ``path``, naming ``doing``."""

    def __init__(self, path: Path, doing: str) -> None:
        self.path = path
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            for _ in range(2):
                try:
                    handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
                except FileExistsError:
                    if _holder_is_alive(path):
                        break
                    path.unlink(missing_ok=True)
                    continue
                self._fill(handle)
                return
        raise StoreError(
            message(
                f"{path.parent} is being {doing}",
                got=f"lock {path}: {_holder(path)}",
                remedy="use another folder; if no such process runs, delete the lock file",
            )
        )

    def _fill(self, handle: int) -> None:
        try:
            os.write(handle, dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())
        except OSError:
            self.path.unlink(missing_ok=True)
            raise
        finally:
            os.close(handle)

    def free(self) -> None:
        """Give the folder free."""
        self.path.unlink(missing_ok=True)


def _holder(path: Path) -> str:
    try:
        return path.read_bytes()[:200].decode(errors="replace")
    except OSError:
        return "taken"


def _holder_is_alive(path: Path) -> bool:
    while True:
        try:
            holder = loads(path.read_bytes())
            if holder["host"] != socket.gethostname():
                return True
            os.kill(holder["pid"], 0)
            return True
        except (ProcessLookupError, FileNotFoundError):
            return False
        except PermissionError:
            return True
        except (ValueError, KeyError, TypeError, OverflowError):  # no name: its holder died, or is about to fill it
            if _age(path) > _FILLING:
                return False
        time.sleep(0.01)


def _age(path: Path) -> float:
    try:
        return time.time() - path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
