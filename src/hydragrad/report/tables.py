"""Tables for the terminal (they need rich)."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table
from torch import Tensor

from hydragrad.attribution import Ranked
from hydragrad.labels import label_of


def ranking_table(ranked: Sequence[Ranked], data: Any, true_labels: Tensor | None = None) -> Table:
    """The rows of ``Attribution.top`` with the labels of the examples, where they have some."""
    labels = [label_of(data, row.id) for row in ranked]
    table = Table(header_style="bold")
    table.add_column("example", justify="right")
    table.add_column("score", justify="right")
    if any(label is not None for label in labels):
        table.add_column("label", justify="right")
    if true_labels is not None:
        table.add_column("true label", justify="right")
    for row, label in zip(ranked, labels, strict=True):
        cells = [str(row.id), f"{row.score:+.4g}"]
        if len(table.columns) > 2:
            cells.append("" if label is None else str(label))
        if true_labels is not None:
            true = int(true_labels[row.id])
            cells.append(f"[red]{true}[/red]" if label is not None and true != label else str(true))
        table.add_row(*cells)
    return table


def plain_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Words in the first column, numbers in the others."""
    table = Table(header_style="bold")
    for place, header in enumerate(headers):
        table.add_column(header, justify="right" if place else "left")
    for row in rows:
        table.add_row(*row)
    return table
