"""The answer of a validation: what the scores predicted, what retraining gave, and how well the two agree."""

from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

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
from hydragrad.report.intervals import LEAST, Interval, column_pearson, column_spearman, mean_interval
from hydragrad.retraining.designs import Item
from hydragrad.shapes import Float, Int

if TYPE_CHECKING:
    import pandas

_FORMAT = 2
_WHAT = {
    "loo": "leaving one out",
    "subset": "removing random subsets (linear datamodeling score)",
    "remove": "removing the most helpful, the most harmful and random examples",
    "relabel": "giving examples another label",
}
_WORDS = (
    (0.8, "the scores order these changes almost as real retraining does"),
    (0.5, "the scores order these changes roughly as real retraining does"),
    (0.2, "the scores say only a little about what real retraining does"),
    (-0.2, "the scores say nothing about what real retraining does"),
    (float("-inf"), "the scores say the opposite of what real retraining does: was their sign turned around?"),
)


@final
@dataclass(frozen=True)
class Validation:
    """Predicted against real changes of the queries, for n retrainings and M queries (or aggregates of them).

        predicted[k, j] = sum of the scores of what was changed in retraining k
        actual[k, j]    = m_j(retrained) - m_j(as trained)

    ``before`` [M]: m_j as trained; ``items``: what was changed; ``accuracy`` [n] and ``accuracy_before``: fraction of
    queries that are right (NaN if not asked); ``seed``: of the choice; ``plan``, ``seconds``;
    ``threads``: torch's, of all replays; ``bitwise``: replaying as trained gave the recorded model bit for bit;
    ``run``: tells the run that was retrained from others (empty: not known).

    Example: ``print(hydragrad.validate(run, scores, test_set))``.
    """

    metric: str
    method: str
    predicted: Float[Tensor, "n M"]
    actual: Float[Tensor, "n M"]
    before: Float[Tensor, " M"]
    query_ids: Int[Tensor, " M"]
    items: tuple[Item, ...]
    accuracy: Float[Tensor, " n"]
    accuracy_before: float
    seed: int
    seconds: float
    threads: int
    bitwise: bool
    plan: str
    run: str = ""

    @property
    def finite(self) -> Tensor:
        """Which retrainings ended with finite numbers, bool [n]; the others count in no correlation."""
        return self.actual.isfinite().all(1)

    @cached_property
    def spearman(self) -> Float[Tensor, " M"]:
        """Spearman's rank correlation over the retrainings, for each query; NaN where a column is constant."""
        return column_spearman(self.predicted[self.finite], self.actual[self.finite])

    @cached_property
    def pearson(self) -> Float[Tensor, " M"]:
        """The linear correlation over the retrainings, for each query."""
        return column_pearson(self.predicted[self.finite], self.actual[self.finite])

    @cached_property
    def correlation(self) -> Interval:
        """The mean of ``spearman`` with its 95 % interval, for the choice of retrainings and of queries.

        Its ends are NaN for fewer than 6 retrainings, and for "remove", whose retrainings are nested in each other.
        """
        if self.metric == "remove":
            nan = float("nan")
            return Interval(float(self.spearman.nanmean()), nan, nan)
        return mean_interval(self.predicted[self.finite], self.actual[self.finite])

    @property
    def agreement(self) -> str:
        """The rank correlation with its interval, in words."""
        if self.metric == "remove":
            return f"{self.correlation.mean:.2f} (no interval: one removal lies within the next)"
        return str(self.correlation)

    @property
    def relative_error(self) -> float:
        """``||predicted - actual|| / ||actual||`` over all entries: also sizes count, not only their order."""
        error = (self.predicted - self.actual)[self.finite].norm()
        return float(error / self.actual[self.finite].norm())

    @property
    def what(self) -> str:
        """What was done to the training data, in words."""
        return _WHAT[self.metric]

    @property
    def conclusion(self) -> str:
        """What the rank correlation says of the scores, in words."""
        mean = self.correlation.mean
        if mean != mean:
            return "undefined: too few changes, or none with any effect"
        if (n := int(self.finite.sum())) < LEAST:
            return f"{n} retraining(s) are too few for a conclusion: take {LEAST} at least"
        words = next(words for least, words in _WORDS if mean >= least)
        if self.correlation.low <= 0 <= self.correlation.high and abs(mean) >= 0.2:
            words += ", but so few retrainings could show that by chance"
        return words

    def curves(self, target: int | None = None) -> "dict[str, list[Point]]":
        """For "remove": kind -> points by size, of one query id, or of the mean over the queries (None).

        Random draws of the same size are averaged. Raises MismatchError for a target that was not asked.
        """
        column = slice(None) if target is None else slice(self._column(target), self._column(target) + 1)
        found: dict[str, list[Point]] = {}
        for kind in ("helpful", "harmful", "random"):
            sizes = sorted({i.size for i in self.items if i.kind == kind and (kind == "random" or i.target == target)})
            for size in sizes:
                chosen = [
                    k
                    for k, item in enumerate(self.items)
                    if (item.kind, item.size) == (kind, size) and (kind == "random" or item.target == target)
                ]
                real, said = (float(x[chosen][:, column].mean()) for x in (self.actual, self.predicted))
                found.setdefault(kind, []).append(Point(size, said, real, float(self.accuracy[chosen].mean())))
        if "helpful" not in found:
            raise MismatchError(
                message(f"no curves for target {target}", remedy="validate with metric='remove' and targets=[...]")
            )
        return found

    def __str__(self) -> str:
        n, M = self.actual.shape
        lines = [
            f"{self.method} scores put to the proof by {self.what}: {n} retrainings, {M} queries, seed {self.seed}, "
            f"{self.seconds:.1f} s",
            f"  rank correlation of predicted and real change: {self.agreement}",
            f"    1: ordered as retraining orders them; 0: no relation. Mean over the queries, over {n} changes each",
            f"  linear correlation {float(self.pearson.nanmean()):.2f}; relative error of the sizes "
            f"{self.relative_error:.2f}",
        ]
        lines.append(f"  so: {self.conclusion}")
        return "\n".join([*lines, *self._curve_lines(), *(f"  - {note}" for note in self.notes)])

    def to_pandas(self) -> "pandas.DataFrame":
        """One row a retraining and query: item, kind, size, ids, query, predicted, actual."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas() needs pandas: pip install 'hydragrad[pandas]'") from error
        n, M = self.actual.shape
        table = {
            "item": [k for k in range(n) for _ in range(M)],
            "kind": [item.kind for item in self.items for _ in range(M)],
            "size": [item.size for item in self.items for _ in range(M)],
            "ids": [item.ids for item in self.items for _ in range(M)],
            "query": self.query_ids.tolist() * n,
            "predicted": self.predicted.flatten().tolist(),
            "actual": self.actual.flatten().tolist(),
        }
        return pandas.DataFrame(table)

    def plot(self, path: str | Path) -> Path:
        """Write a PNG: predicted against real changes; for "remove" the curves. Needs matplotlib."""
        from hydragrad.report.proof import draw_validation

        return draw_validation(path, self)

    def save(self, path: str | Path) -> Path:
        """Write to one safetensors file, atomically; returns its path. A StoreError leaves an old file whole."""
        path = path_of(path)
        counts = torch.tensor([len(item.ids) for item in self.items])
        ids = torch.tensor([i for item in self.items for i in item.ids], dtype=torch.int64)
        about = {
            name: getattr(self, name)
            for name in ("metric", "method", "accuracy_before", "seed", "seconds", "threads", "bitwise", "plan", "run")
        }
        about["items"] = [{k: v for k, v in asdict(item).items() if k != "ids"} for item in self.items]
        tensors = {name: getattr(self, name) for name in _TENSORS} | {"ids": ids, "counts": counts}
        about["format"] = _FORMAT
        tables = {"validation": about, "sha256": seal(about, tensors)}
        write_atomically(path, save_tensors(tensors, tables))
        return path

    @staticmethod
    def load(path: str | Path) -> "Validation":
        """Read what ``save`` wrote; raises StoreError for anything else, and for the slightest change."""
        path = path_of(path)
        tensors, tables = load_tensors(path, read_bytes(path))
        about = tables.get("validation")
        if not isinstance(about, dict) or about.get("format") != _FORMAT:
            raise StoreError(
                message(
                    f"{path} holds no validation of this version",
                    got=f"tables {sorted(tables)}",
                    remedy="name a file made by Validation.save",
                )
            )
        if tables.get("sha256") != seal(about, tensors):
            raise StoreError(broken_file(path, "was altered", "the hash of its content", str(tables.get("sha256"))))
        with reading(path):
            parts = tensors.pop("ids").split(tensors.pop("counts").tolist())
            items = (Item(ids=tuple(ids.tolist()), **item) for ids, item in zip(parts, about.pop("items"), strict=True))
            del about["format"]
            return Validation(**tensors, items=tuple(items), **about)

    def _curve_lines(self) -> list[str]:
        targets = sorted({i.target for i in self.items if i.kind == "helpful"}, key=lambda t: -1 if t is None else t)
        lines = []
        for target in targets:
            whose = "mean over the queries" if target is None else f"query {target}"
            lines.append(f"  {whose}, change by number of examples removed (predicted, real):")
            for kind, points in self.curves(target).items():
                cells = "  ".join(f"{p.size}: {p.predicted:+.3f}, {p.actual:+.3f}" for p in points)
                lines.append(f"    {kind:8} {cells}")
                if points[0].accuracy == points[0].accuracy:
                    right = "  ".join(f"{p.size}: {p.accuracy:.3f}" for p in points)
                    lines.append(f"    {'':8} accuracy (as trained {self.accuracy_before:.3f})  {right}")
        return lines

    @property
    def notes(self) -> list[str]:
        """What to keep in mind with these numbers, in words."""
        notes = []
        if self.metric == "relabel":
            notes.append(
                "predicted is the effect of removing the example: scores know nothing of its new label. A new label "
                "that is right should change the queries in that direction, and further"
            )
        if self.metric == "remove":
            notes.append(
                "each removal contains the smaller ones of its ranking, and the rankings are made from these scores: "
                "the correlations are higher than those of independent changes (metric='subset'). Look at the curves"
            )
        if lost := int((~self.finite).sum()):
            notes.append(f"{lost} retraining(s) diverged (NaN or infinity) and count in no correlation")
        if constant := int(self.spearman.isnan().sum()):
            notes.append(f"{constant} query(ies) without any change to correlate are left out of the mean")
        if not self.bitwise:
            notes.append(
                f"replays with {self.threads} thread(s) here do not give the recorded model bit for bit: all "
                "retrainings started at step 0 and are compared with a replay in the same setting"
            )
        return notes

    def _column(self, query: int) -> int:
        places = (self.query_ids == query).nonzero().flatten()
        if len(places) != 1:
            raise MismatchError(message("no such query", expected=self.query_ids[:8].tolist(), got=query))
        return int(places[0])


@final
@dataclass(frozen=True)
class Point:
    """One point of a removal curve: rows removed, predicted and real change, accuracy afterwards (NaN: not asked)."""

    size: int
    predicted: float
    actual: float
    accuracy: float


_TENSORS = ("predicted", "actual", "before", "query_ids", "accuracy")
