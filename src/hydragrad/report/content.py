"""What stands on a page, before anyone thinks of how it looks."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from hydragrad.report.charts import Chart
from hydragrad.report.samples import Look

VERDICTS = {
    "reliable": "These scores can be believed: they predict what training without an example really does.",
    "doubtful": "Take these scores with care: they predict what training without an example does only roughly.",
    "meaningless": "Do not build on these scores: they do not predict what training without an example does.",
    "unchecked": "Nobody has checked these scores: they were computed without the check against retraining.",
}


@final
@dataclass(frozen=True)
class Example:
    """A training example (or group) of a ranking: its score (bare, with a sign, in words), name, label, looks.

    ``true``: the true label, where the given one is known to be wrong.
    """

    id: int
    score: float
    signed: str
    words: str
    name: str
    label: str = ""
    true: str = ""
    look: Look | None = None


@final
@dataclass(frozen=True)
class Query:
    """A query, what the model says of it, and the training examples that did most for and against it."""

    id: int
    name: str
    said: str
    wrong: bool
    helpful: Sequence[Example]
    harmful: Sequence[Example]
    look: Look | None = None


@final
@dataclass(frozen=True)
class Suspicious:
    """A training example whose label does not fit."""

    id: int
    label: str
    suggested: str
    confidence: str
    true: str
    look: Look


@final
@dataclass(frozen=True)
class Proof:
    """What retraining gave: words, further words, a chart."""

    title: str
    words: Sequence[str]
    chart: Chart | None


@final
@dataclass(frozen=True)
class Page:
    """All of it; an empty part is left out of the page."""

    title: str
    verdict: str
    reasons: Sequence[str]
    summary: str
    queries: Sequence[Query]
    chosen: str
    what: str
    """What rises and falls: "the loss"."""
    overall: Query | None
    histogram: Chart
    by_class: Chart | None
    suspects: Sequence[Suspicious]
    suspects_note: str
    proofs: Sequence[Proof]
    facts: Sequence[tuple[str, str]]
    checks: Sequence[tuple[str, str, str]]
    charts: Sequence[tuple[str, Chart]]

    @property
    def sentence(self) -> str:
        """The verdict in plain words."""
        return VERDICTS[self.verdict]
