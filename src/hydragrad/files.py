"""Files: written whole or not at all, JSON that holds what JSON cannot, tensors as safetensors. Nothing is pickled."""

import contextlib
import errno
import hashlib
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from hydragrad.errors import StoreError, UnsupportedError, message


def path_of(path: str | Path, argument: str = "path") -> Path:
    """``path``, refused if it is empty: that would be the current folder, which nobody means."""
    if not str(path).strip():
        raise StoreError(
            message(
                f"{argument} is empty",
                expected="the name of a folder or file",
                got=repr(path),
                cause="a variable that was not set",
                remedy='name it (the current folder is ".")',
            )
        )
    return Path(path)


def to_json(value: Any) -> Any:
    """Plain JSON for numbers (also NaN and infinities), strings, None, tuples, lists and string-keyed dicts."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, tuple):
        return {"$tuple": [to_json(part) for part in value]}
    if isinstance(value, list):
        return [to_json(part) for part in value]
    if isinstance(value, dict):
        return {str(key): to_json(part) for key, part in value.items()}
    raise UnsupportedError(
        message(
            "a value cannot be recorded",
            expected="numbers, strings, None, tuples, lists, dicts of these",
            got=f"{type(value).__name__}: {str(value)[:60]}",
        )
    )


def from_json(value: Any) -> Any:
    """Inverse of ``to_json``."""
    if isinstance(value, dict):
        if set(value) == {"$float"}:
            return float(value["$float"])
        if set(value) == {"$tuple"}:
            return tuple(from_json(part) for part in value["$tuple"])
        return {key: from_json(part) for key, part in value.items()}
    return [from_json(part) for part in value] if isinstance(value, list) else value


def dumps(value: Any) -> str:
    """One line of strict JSON."""
    return _ENCODER.encode(to_json(value))


_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))


def loads(text: str | bytes) -> Any:
    """Inverse of ``dumps``; raises ValueError for everything that ``dumps`` does not write."""
    try:
        return from_json(json.loads(text, parse_constant=_no_constant))
    except (TypeError, RecursionError) as error:  # {"$tuple": 1}; brackets nested a thousand deep
        raise ValueError(f"not as written: {error}") from error


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def stage(path: Path, data: bytes, *, durable: bool = True) -> Path:
    """Write ``data`` beside ``path`` and return that temporary file, to be renamed; ``path`` is left alone.

    ``durable``: a failure of power, too, finds it whole once it is renamed; else that takes ``make_durable``.
    Raises StoreError, and leaves nothing behind, where there is no space or no permission.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                if durable:
                    os.fsync(file.fileno())
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
    return temporary


def write_atomically(path: Path, data: bytes, *, durable: bool = True) -> None:
    """Write a whole file, or nothing: a reader (or a kill) never sees a part of it. Raises StoreError.

    ``durable``: see ``stage``.
    """
    temporary = stage(path, data, durable=durable)
    with writing(path):
        try:
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def make_durable(path: Path) -> None:
    """See to it that what was written lies on the disk, and not in the system's memory alone. Raises StoreError."""
    with writing(path), open(path, "r+b") as file:
        os.fsync(file.fileno())


def reserve(path: Path, size: int) -> None:
    """Make a file of ``size`` bytes that has its space on disk: a memory map finds a full disk by being killed.

    Raises StoreError where there is no space.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):  # a file system that cannot reserve
                    path.unlink(missing_ok=True)
                    raise


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the system's refusals to write ``path`` into a StoreError."""
    try:
        yield
    except OSError as error:
        raise StoreError(
            message(
                f"cannot write {path}",
                expected="a folder that can be written, with space left",
                got=error.strerror or str(error),
                cause="a full disk or quota, a folder without write permission, or a file where a folder should be",
                remedy="free some space or give another folder; what was written before is intact",
            )
        ) from error


def read_bytes(path: Path) -> bytes:
    """The file's bytes; raises StoreError, naming it, where it cannot be read."""
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise StoreError(broken_file(path, "is missing", "a file", "nothing")) from error
    except IsADirectoryError as error:
        raise StoreError(
            message(f"{path} is a folder", expected="a file", cause="a run's folder where an answer's file should be")
        ) from error
    except OSError as error:
        raise StoreError(
            broken_file(path, "cannot be read", "a readable file", error.strerror or str(error))
        ) from error


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn whatever decoding ``path`` raises on content that was never written so into a StoreError."""
    try:
        yield
    except _UNREADABLE as error:
        got = f"{type(error).__name__}: {str(error)[:200]}"
        raise StoreError(broken_file(path, "cannot be read", "what hydragrad writes in such a file", got)) from error


_UNREADABLE = (SafetensorError, LookupError, ValueError, TypeError, AttributeError, ArithmeticError, RuntimeError)
_UNREADABLE += (MemoryError,)


def broken_file(path: Path, what: str, expected: str, got: str) -> str:
    """A refusal's message for a file that is not what was written."""
    return message(
        f"{path} {what}",
        expected=expected,
        got=got,
        cause="the file was edited, swapped, deleted or only partly copied after it was written, or another is meant",
        remedy="copy it again, whole, make it anew, or look at the path",
    )


def seal(about: dict[str, Any], tensors: dict[str, Tensor]) -> str:
    """A hash of a description and of named tensors: all that a file of an answer holds."""
    parts = [dumps(about).encode()]
    for name, tensor in sorted(tensors.items()):
        parts.append(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        parts.append(tensor.detach().cpu().contiguous().numpy().tobytes())
    return sha256(b"\n".join(parts))


def save_tensors(tensors: dict[str, Tensor], tables: dict[str, Any] | str) -> bytes:
    """Named tensors and tables (or their JSON, as ``dumps`` makes it) as one safetensors file."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    return safetensors_save(plain, {"tables": tables if isinstance(tables, str) else dumps(tables)})


def load_tensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of ``save_tensors`` (``data``: the verified bytes of ``path``); raises StoreError."""
    with reading(path):
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        tables = loads(header["__metadata__"]["tables"])
        if not isinstance(tables, dict):
            raise ValueError("tables are no dict")
        return safetensors_load(data), tables
