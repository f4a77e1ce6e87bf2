"""``python -m tests.support_table`` writes docs/support.md: what works with what, as a real run of each finds."""

from pathlib import Path

from tests.support.tables import TABLES, reasons

PAGE = Path(__file__).resolve().parent.parent / "docs" / "support.md"
HEAD = """# Support

What works with what. Every cell is a tiny run that was really recorded, loaded, replayed, attributed with
`method="exact"` and compared. The page is written by `python -m tests.support_table`, and a test holds every row
of it against what it finds.

- **exact**: the replay is bit for bit the recorded run, and the scores are those of a dense oracle in float64 that
  unrolls the whole run with autograd and shares no code with the library, to 1e-9 of the largest (1e-4 in float32).
- **near**: the replay is bit for bit; the scores are those of full precision, up to the rounding of the training.
- **refused**: a `HydragradError` says what was expected, what was got, the likely cause and the remedy.
- **-**: that model has nothing of the kind.

Every run takes some example twice in a batch, leaves one out later, and ends within a pass. Where no optimizer is
named, it is SGD with Nesterov momentum and weight decay; where no model is named, an MLP with tanh.
"""


def page() -> str:
    """The whole page, found anew."""
    lines, met = [HEAD], []
    for table in TABLES:
        lines += table.head()
        for row in table.rows:
            line, found = table.line(row)
            lines.append(line)
            met += [(f"{row}, {column}", cell) for column, cell in found]
        lines.append("")
    lines += ["## Why", "", "| | first met at | why |", "|---|---|---|", *reasons(met), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
