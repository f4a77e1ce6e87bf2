"""The answer: a named matrix of scores."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, final

import torch
from torch import Tensor

from hydragrad.asked import Asked
from hydragrad.diagnostics import Diagnostics
from hydragrad.errors import MismatchError, StoreError, message
from hydragrad.files import (
    broken_file,
    load_tensors,
    path_of,
    read_bytes,
    reading,
    save_tensors,
    seal,
    write_atomically,
)
from hydragrad.shapes import Float, Int

if TYPE_CHECKING:
    import pandas

_FORMAT = 2


class Ranked(NamedTuple):
    """One row of ``Attribution.top``: a training example (or group) and its score."""

    id: int
    score: float


class RankedToken(NamedTuple):
    """One row of ``Attribution.top_tokens``: a training example, the token of it, and its score."""

    id: int
    token: int
    score: float


@final
@dataclass(frozen=True)
class Attribution:
    """Scores of training examples (rows) for queries (columns).

        values[i, j] = - d m_j / d eps_i

    to first order the amount by which measurement m_j RISES if example i is removed from the whole run. Positive: the
    example helped query j; negative: it harmed. [N, M]; with ``by_epoch`` [E, N, M]; with ``tokens`` [N, L, M] (or
    [E, N, L, M]): token by token, 0 beyond the end of a short batch; on the CPU, in the run's dtype.
    ``train_ids`` [N]: positions in the training data (or group numbers); ``query_ids`` [M]: positions among the
    queries (or query groups); ``run``: tells the run that was attributed from others (empty: not known);
    ``asked``: tells the question from others (None: not known).
    Source: HYDRA, arXiv 2102.02515, whose eps is scaled by 1/N.

    Example: ``scores.top(query=3, k=10)``.
    """

    values: Float[Tensor, "*axes M"]
    train_ids: Int[Tensor, " N"]
    query_ids: Int[Tensor, " M"]
    method: str
    diagnostics: Diagnostics
    tokens: bool = False
    run: str = ""
    asked: Asked | None = None

    def __post_init__(self) -> None:
        expected, shape = (len(self.train_ids), len(self.query_ids)), self.values.shape
        axes = shape[:-2] + shape[-1:] if self.tokens else shape
        if tuple(axes[-2:]) != expected or len(axes) not in (2, 3):
            raise MismatchError(
                message(
                    "values do not fit train_ids and query_ids", expected=list(expected), got=list(self.values.shape)
                )
            )

    def __repr__(self) -> str:
        shape = " x ".join(str(n) for n in self.values.shape)
        return f"Attribution({shape}, {self.method}, {self.diagnostics.verdict})"

    @property
    def total(self) -> Float[Tensor, "N M"]:
        """``values`` summed over epochs and tokens, [N, M]."""
        values = self.values.sum(-2) if self.tokens else self.values
        return values.sum(0) if values.dim() == 3 else values

    def top(self, query: int, k: int = 10, *, largest: bool = True) -> list[Ranked]:
        """The k most helpful training examples for ``query`` (one of ``query_ids``); ``largest=False``: harmful."""
        column = self.total[:, self._column(query)]
        k = min(max(k, 0), len(column))
        order = column.sort(descending=largest, stable=True).indices[:k]
        return [Ranked(int(self.train_ids[row]), float(column[row])) for row in order]

    def top_tokens(self, query: int, k: int = 10, *, largest: bool = True) -> list[RankedToken]:
        """The k most helpful tokens for ``query``, of scores with ``tokens``; ``largest=False``: harmful."""
        if not self.tokens:
            raise MismatchError(
                message("the tokens were summed", expected="scores per token", remedy="attribute(..., tokens=True)")
            )
        column = self.values[..., self._column(query)]
        column = column.sum(0) if column.dim() == 3 else column
        order = column.flatten().sort(descending=largest, stable=True).indices[: max(k, 0)]
        places = [divmod(int(place), column.shape[1]) for place in order]
        return [RankedToken(int(self.train_ids[row]), token, float(column[row, token])) for row, token in places]

    def averaged(self) -> "Attribution":
        """The scores for the mean over all queries, as one column [N, 1] with query id 0."""
        mean, only = self.total.mean(1, keepdim=True), torch.zeros(1, dtype=torch.int64)
        asked = None if self.asked is None else self.asked.averaged()
        return replace(self, values=mean, query_ids=only, tokens=False, asked=asked)

    def to_pandas(self) -> "pandas.DataFrame":
        """A table: rows ``train_ids``, columns ``query_ids``; with epochs or tokens, rows are (epoch, train, token)."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install 'hydragrad[pandas]'") from error
        columns = pandas.Index(self.query_ids.tolist(), name="query")
        rows = pandas.Index(self.train_ids.tolist(), name="train")
        values = self.values
        if self.tokens:
            positions = pandas.RangeIndex(values.shape[-2], name="token")
            rows, values = pandas.MultiIndex.from_product([rows, positions]), values.flatten(-3, -2)
        if values.dim() == 2:
            return pandas.DataFrame(values.numpy(), index=rows, columns=columns)
        tables = {epoch: pandas.DataFrame(v.numpy(), index=rows, columns=columns) for epoch, v in enumerate(values)}
        return pandas.concat(tables, names=["epoch"])  # pyright: ignore

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file, atomically; returns its path. A StoreError leaves an old file whole."""
        path = path_of(path)
        tensors = {"values": self.values, "train_ids": self.train_ids, "query_ids": self.query_ids}
        about = {"format": _FORMAT, "method": self.method, "run": self.run, "diagnostics": self.diagnostics.to_dict()}
        about |= {"tokens": True} if self.tokens else {}
        if (asked := self.asked) is not None:
            tensors["measured"] = asked.measured
            about["asked"] = {"step": asked.step, "groups": asked.groups, "measurement": asked.measurement}
        tables = {"attribution": about, "sha256": seal(about, tensors)}
        write_atomically(path, save_tensors(tensors, tables))
        return path

    @staticmethod
    def load(path: str | Path) -> "Attribution":
        """Read what ``save`` wrote; raises StoreError for anything else, and for the slightest change."""
        path = path_of(path)
        tensors, tables = load_tensors(path, read_bytes(path))
        about = tables.get("attribution")
        version = about.get("format") if isinstance(about, dict) else None
        if version != _FORMAT or set(tensors) - {"measured"} != {"values", "train_ids", "query_ids"}:
            raise StoreError(
                message(
                    f"{path} holds no attribution of this version",
                    expected=f"format {_FORMAT}",
                    got=f"format {version}, tensors {sorted(tensors)}",
                    remedy="name a file made by Attribution.save",
                )
            )
        assert isinstance(about, dict)
        if tables.get("sha256") != seal(about, tensors):
            raise StoreError(broken_file(path, "was altered", "the hash of its content", str(tables.get("sha256"))))
        with reading(path):
            measured, known = tensors.pop("measured", None), dict(about.get("asked", {}))
            return Attribution(
                **tensors,
                method=about["method"],
                diagnostics=Diagnostics.from_dict(about["diagnostics"]),
                tokens=about.get("tokens", False),
                run=str(about.get("run", "")),
                asked=None if measured is None else Asked(measured, **known),
            )

    def __iter__(self) -> Iterator[Tensor]:
        raise TypeError("an Attribution is not a sequence: use .values, .top(query) or .to_pandas()")

    def _column(self, query: int) -> int:
        places = (self.query_ids == query).nonzero().flatten()
        if len(places) != 1:
            raise MismatchError(
                message(
                    "no such query",
                    expected=f"one of {len(self.query_ids)} query ids, such as {self.query_ids[:5].tolist()}",
                    got=query,
                    remedy="query ids are positions in the queries that were given",
                )
            )
        return int(places[0])
