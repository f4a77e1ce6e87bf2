"""The page of what is supported says what is found: every row of it is run again."""

from pathlib import Path

import pytest

from tests.support.cells import general
from tests.support.tables import SYMBOLS, TABLES, Table
from tests.support_table import HEAD

ROWS = [(table, row) for table in TABLES for row in table.rows]


@pytest.fixture(scope="module")
def page() -> list[str]:
    path = Path(__file__).resolve().parent.parent / "docs" / "support.md"
    return path.read_text(encoding="utf-8").splitlines()


@pytest.mark.parametrize(("table", "row"), ROWS, ids=[f"{table.title}: {row}" for table, row in ROWS])
def test_every_row_is_what_is_found(table: Table, row: str, page: list[str]) -> None:
    start = page.index(f"## {table.title}")
    line, found = table.line(row)
    assert line in page[start : start + 4 + len(table.rows)], (
        "run python -m tests.support_table, and look at what changed"
    )
    why = page[page.index("## Why") :]
    for _, cell in found:
        assert not cell.reason or any(
            told.startswith(f"| {SYMBOLS[cell.kind]} |") and told.endswith(f"| {cell.reason} |") for told in why
        )


def test_the_page_has_these_rows_and_no_others(page: list[str]) -> None:
    lines = [line for line in page[: page.index("## Why")] if line.startswith("| ")]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [
        name for table in TABLES for name in (table.first, *table.rows)
    ]
    assert "\n".join(page).startswith(HEAD)
    assert all(line in page for table in TABLES for line in table.head())


def test_reasons_hold_for_every_run() -> None:
    assert general("before step 3 a batch changed the buffer '1.mean'. Expected: x.") == (
        "before step n a batch changed the buffer '...'"
    )
