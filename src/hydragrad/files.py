"""Files: written whole or not at all, JSON that holds what JSON cannot, tensors as safetensors. Nothing is pickled."""

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from hydragrad.errors import StoreError, UnsupportedError, message


def to_json(value: Any) -> Any:
    """Plain JSON for numbers (also NaN and infinities), strings, None, tuples, lists and string-keyed dicts."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": repr(value)}
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
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
    return json.dumps(to_json(value), allow_nan=False, separators=(",", ":"))


def loads(text: str | bytes) -> Any:
    """Inverse of ``dumps``."""
    return from_json(json.loads(text))


def sha256(data: bytes) -> str:
    """Hex digest."""
    return hashlib.sha256(data).hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a whole file, or nothing: a reader (or a kill) never sees a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def broken_file(path: Path, what: str, expected: str, got: str) -> str:
    """A refusal's message for a file that is not what was written."""
    return message(
        f"{path} {what}",
        expected=expected,
        got=got,
        cause="the file was edited, swapped, deleted or only partly copied after recording",
        remedy="copy the run's folder again, or record the run again",
    )


def save_tensors(tensors: dict[str, Tensor], tables: dict[str, Any]) -> bytes:
    """Named tensors and JSON tables as one safetensors file."""
    plain = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    return safetensors_save(plain, {"tables": dumps(tables)})


def load_tensors(path: Path, data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Inverse of ``save_tensors`` (``data``: the verified bytes of ``path``)."""
    try:
        with safe_open(path, framework="pt") as file:
            tables = loads((file.metadata() or {})["tables"])
        return safetensors_load(data), tables
    except (SafetensorError, KeyError, ValueError) as error:
        raise StoreError(broken_file(path, "cannot be read", "a safetensors file with tables", str(error))) from error
