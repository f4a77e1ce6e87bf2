"""What all scores say together: who moves whom by label, and whose labels are suspicious."""

import torch
from torch import Tensor

from hydragrad.report.charts import Chart, heat
from hydragrad.report.content import Suspicious
from hydragrad.report.display import Display
from hydragrad.report.subject import Subject
from hydragrad.suspects import Suspects

HEATED, SUSPECTS = 25, 20
"""Distinct labels up to which a matrix can be read; suspects shown."""


def share_by_label(subject: Subject) -> tuple[Tensor, list[int], list[int]] | None:
    """Parts [R, C] of sum |score| on the queries of a label (columns, each adding to 1) by the training label (rows).

    None where training examples or queries have no labels, one label, or too many.
    """
    if subject.groups is not None or subject.labels is None or subject.query_labels is None:
        return None
    of_rows, rows = subject.labels[subject.scores.train_ids].unique(return_inverse=True)
    of_columns, columns = subject.query_labels[subject.scores.query_ids].unique(return_inverse=True)
    if not (2 <= len(of_rows) <= HEATED and 2 <= len(of_columns) <= HEATED):
        return None
    by_query = torch.zeros(len(of_rows), len(columns), dtype=torch.float64)
    for first in range(0, len(columns), 256):  # never a second copy of all scores
        part = subject.scores.total[:, first : first + 256].abs().double()
        by_query[:, first : first + 256].index_add_(0, rows, part)
    sums = torch.zeros(len(of_rows), len(of_columns), dtype=torch.float64).index_add_(1, columns, by_query)
    return sums / sums.sum(0).clamp_min(1e-300), of_rows.tolist(), of_columns.tolist()


def heat_by_label(subject: Subject, display: Display) -> Chart | None:
    """The chart of ``share_by_label``."""
    found = share_by_label(subject)
    if found is None:
        return None
    parts, rows, columns = found
    return heat(parts, [display.named(label) for label in rows], [display.named(label) for label in columns])


def suspicious(suspects: Suspects | None, display: Display) -> list[Suspicious]:
    """The first of the suspects, as they look."""
    rows = suspects.top(SUSPECTS) if suspects is not None else []
    return [
        Suspicious(
            id=row.id,
            label=display.named(row.label),
            suggested="" if row.suggested == row.label else display.named(row.suggested),
            confidence="" if row.confidence is None else f"{row.confidence:.0%}",
            true=display.wrong(row.id, row.label),
            look=display.look(display.data, row.id),
        )
        for row in rows
    ]


def suspects_note(suspects: Suspects | None) -> str:
    """By what they are ranked, and how many there are."""
    if suspects is None:
        return ""
    words = f"The most suspicious of {len(suspects):,} training examples, by {suspects.signal} along the run."
    if suspects.suggested is not None:
        words += f" For {int(suspects.flagged.sum()):,} of them another label fits better."
    return f"{words} {suspects.note}".rstrip()
