"""The page of faults says what the tests show: every row names tests, and they exist."""

import re
from pathlib import Path

import pytest

NAME = re.compile(r"`(test_\w+)`")


@pytest.fixture
def rows(repository: Path) -> list[str]:
    lines = (repository / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.startswith("| ") and not line.startswith("| fault |")]


def test_every_row_of_the_page_names_tests_that_exist(rows: list[str], repository: Path) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (repository / "tests").rglob("test_*.py")]
    there = {name for source in sources for name in re.findall(r"^def (test_\w+)\(", source, re.MULTILINE)}
    assert len(rows) > 35
    for row in rows:
        assert row.count("|") == 5, row
        named = NAME.findall(row)
        assert named, f"no test: {row}"
        assert set(named) <= there, f"no such test: {sorted(set(named) - there)}"


def test_the_page_is_in_the_navigation(repository: Path) -> None:
    assert "faults.md" in (repository / "mkdocs.yml").read_text(encoding="utf-8")
