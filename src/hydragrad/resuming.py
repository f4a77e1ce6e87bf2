"""Attributions in pieces: every finished block of queries is kept in a folder, and a later call goes on from there."""

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from hydragrad.errors import MismatchError, StoreError, message
from hydragrad.files import broken_file, load_tensors, path_of, reading, save_tensors, sha256, write_atomically
from hydragrad.hypergradient.choosing import Fixed
from hydragrad.journal import FileRef, Journal, read_journal, sealed
from hydragrad.locks import Lock

_FORMAT = 1
_JOURNAL, _LOCK = "sweep.jsonl", "sweep.lock"
_BEFORE = sha256(b"hydragrad attribution in pieces")
_CLOSE = 1e-3  # measured values of the same queries on another machine stay far below, in float32 too

Question = Mapping[str, Any]
"""What is asked, by name: plain values."""


class Piece(NamedTuple):
    """The scores [E or 1, R, k] of some columns, and what their sweep saw; ``sizes`` [k] if one of several runs."""

    values: Tensor
    growths: Mapping[int, float]
    drift: Mapping[int, float]
    sizes: Tensor | None = None


@final
class Pieces:
    """The pieces of one attribution in ``folder``; a context manager, one process at a time.

    ``question`` says what is asked; a folder that was begun with another is refused, naming the difference. Order of
    writing: a journal with question and plan, then for each piece its file, and last the journal's line that makes it
    count. Raises StoreError (broken files, a full disk, another process), MismatchError (another question).
    """

    def __init__(self, folder: str | Path, question: Question) -> None:
        self.folder, self._question = path_of(folder, "resume"), question
        self.plan: Fixed | None = None
        """What was chosen when this attribution began; None: it has not."""
        self._done: dict[tuple[int, int], tuple[FileRef, dict[str, Any]]] = {}
        self._path = self.folder / _JOURNAL
        self._journal: Journal | None = None
        self._lock: Lock | None = None

    def __enter__(self) -> "Pieces":
        self._lock = Lock(self.folder / _LOCK, "swept into by another process")
        try:
            if self._path.exists():
                self._open()
        except BaseException:
            self._lock.free()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._lock is not None
        self._lock.free()

    def begin(self, plan: Fixed) -> None:
        """Write down question and plan, if this is the first call."""
        if self.plan is None:
            line = sealed({"format": _FORMAT, "question": dict(self._question), "plan": asdict(plan)}, _BEFORE)
            write_atomically(self._path, line)
            self.plan, self._journal = plan, Journal.after(self._path, line)

    def load(self, columns: slice, like: Tensor) -> Piece | None:
        """The piece of these columns if it is finished; ``like``: its shape and dtype."""
        if (columns.start, columns.stop) not in self._done:
            return None
        ref, about = self._done[columns.start, columns.stop]
        path = self.folder / ref.name
        tensors, tables = load_tensors(path, ref.read(self.folder))
        values = tensors.get("values")
        if values is None or tables != about or values.shape != like.shape or values.dtype != like.dtype:
            got = None if values is None else (list(values.shape), values.dtype)
            raise StoreError(broken_file(path, "is another piece", f"{list(like.shape)}, {like.dtype}", str(got)))
        return Piece(values, dict(about["growth"]), dict(about["drift"]), tensors.get("sizes"))

    def save(self, columns: slice, piece: Piece) -> None:
        """Keep a finished piece."""
        assert self._journal is not None
        seen = {"growth": piece.growths, "drift": piece.drift}  # by step
        about = {"columns": [columns.start, columns.stop]}
        about |= {name: [[step, value] for step, value in given.items()] for name, given in seen.items()}
        name = f"pieces/{columns.start:08d}.safetensors"
        tensors = {"values": piece.values.contiguous()}
        if piece.sizes is not None:
            tensors["sizes"] = piece.sizes
        ref = FileRef.write(self.folder, name, save_tensors(tensors, about))
        self._journal.append({"piece": ref.to_dict(), "about": about})

    def _open(self) -> None:
        entries, written = read_journal(self._path, _BEFORE, "an attribution")
        first, *rest = entries
        with reading(self._path):
            if first["format"] != _FORMAT:
                raise ValueError(f"format {first['format']}")
            question, plan = dict(first["question"]), Fixed(**first["plan"])
            if not all(type(getattr(plan, f.name)) is f.type for f in fields(Fixed)):
                raise TypeError(f"plan {plan}")
            if min(plan.block, plan.carried, plan.segment) < 1:
                raise ValueError(f"plan {plan}")
        self._compare(question)
        for entry in rest:
            with reading(self._path):
                start, stop = entry["about"]["columns"]
                about = dict(entry["about"])
                for name in ("growth", "drift"):
                    about[name] = [[int(step), float(value)] for step, value in about[name]]
            ref = FileRef.of(entry.get("piece"), self._path)
            ref.check_size(self.folder)
            self._done[start, stop] = (ref, about)
        self.plan, self._journal = plan, Journal.after(self._path, written)

    def _compare(self, begun: Question) -> None:
        """Refuse another question."""
        for name in {**begun, **self._question}:
            asked, kept = self._question.get(name), begun.get(name)
            if asked != kept and not (name == "measured" and _close(asked, kept)):
                raise MismatchError(
                    message(
                        f"{self.folder} holds an attribution that was begun with another question: {name} differs",
                        expected=f"{name} {str(kept)[:80]}",
                        got=f"{name} {str(asked)[:80]}",
                        cause="other arguments, data, code or software than in the call that began it",
                        remedy="ask as in that call, or give another folder",
                    )
                )


def qualified(function: Callable[..., Any] | None) -> str | None:
    """The name under which a function can be told from others."""
    if function is None:
        return None
    named = function if hasattr(function, "__qualname__") else type(function)
    return f"{named.__module__}.{named.__qualname__}"


def summary(values: Tensor) -> list[float]:
    """Three numbers of measured values [M], which change when any of them does, and by rounding only with it."""
    values = values.detach().to("cpu", torch.float64)
    signs = torch.cos(torch.arange(len(values), dtype=torch.float64))
    return [float(values.norm()), float(values.sum()), float(values @ signs)]


def _close(a: Any, b: Any) -> bool:
    if not isinstance(a, list) or not isinstance(b, list) or len(a) != len(b):
        return False
    scale = max(abs(a[0]), abs(b[0]), 1e-30) * _CLOSE
    return all(math.isclose(x, y, abs_tol=scale) for x, y in zip(a, b, strict=True))


def digest(*tensors: Tensor) -> str:
    """Tells tensors from others by their content."""
    return sha256(b"".join(str((x.dtype, tuple(x.shape))).encode() + x.cpu().numpy().tobytes() for x in tensors))
