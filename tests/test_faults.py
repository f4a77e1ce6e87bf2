"""The page of faults says what is so: every row names tests, modules and words, and they exist."""

import ast
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

from tests.messages_table import ROOT, words

CONDITIONS = {
    "drift": "drift", "non-determinism": "non-deterministic", "NaN": "NaN", "infinity": "infinity", "growth": "growth",
    "finite differences": "finite differences", "range": "(range)", "half precision": "half precision",
    "data": "other data", "model": "another model", "loss": "another loss", "reduction": "or reduction",
    "dtype": "another dtype", "killed recording": "a recording killed", "killed training": "a training killed",
    "killed attribution": "an attribution killed", "full disk": "a full disk", "read-only": "read-only",
    "existing run": "holds a run already", "two writers": "two writers", "mutated": "bytes flipped",
    "forged": "forged store", "hostile": "hostile store",
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    fault: str
    how: str
    where: str
    seen: str
    test: str

    def broken(self, there: set[str]) -> list[str]:
        """What the row claims and is not so; ``there``: tests that exist."""
        tests = re.findall(r"`(test_\w+)`", self.test)
        modules = re.findall(r"`([\w.]+)`", self.where)
        quoted = re.findall(r'"([^"]+)"', self.seen)
        wrong = [f"no such test: {name}" for name in tests if name not in there]
        wrong += [f"no such module: {name}" for name in modules if not source_of(name).is_file()]
        if not tests or not modules or not self.how or not self.seen:
            wrong.append("something is not said")
        texts = [text for name in modules if source_of(name).is_file() for text in texts_of(name)]
        for words_ in quoted:
            pattern = ".*".join(map(re.escape, words_.split("...")))
            if len(words_.replace("...", "").strip()) < 8 or not any(re.search(pattern, text) for text in texts):
                wrong.append(f"nobody says: {words_!r}")
        return [f"{self.fault}: {one}" for one in wrong]


def source_of(module: str) -> Path:
    return ROOT / "src" / "hydragrad" / (module.replace(".", "/") + ".py")


@cache
def texts_of(module: str) -> list[str]:
    """Every text in a module, with ... for what is filled in."""
    tree = ast.parse(source_of(module).read_text(encoding="utf-8"))
    return [told for node in ast.walk(tree) if (told := words(node)) is not None]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    lines = (ROOT / "docs" / "faults.md").read_text(encoding="utf-8").splitlines()
    cells = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in lines if line.startswith("| ")]
    assert cells[0] == ["fault", "how it is found", "where", "what you see", "test"]
    return [Row(*parts) for parts in cells[1:] if not parts[0].startswith("**")]


@pytest.fixture(scope="module")
def there() -> set[str]:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py")]
    return {name for source in sources for name in re.findall(r"^def (test_\w+)\(", source, re.MULTILINE)}


def test_every_row_names_tests_modules_and_words_that_exist(rows: list[Row], there: set[str]) -> None:
    assert [wrong for row in rows for wrong in row.broken(there)] == []
    assert len(rows) > 55


@pytest.mark.parametrize("condition", CONDITIONS)
def test_every_condition_has_its_row(rows: list[Row], condition: str) -> None:
    found = [row for row in rows if CONDITIONS[condition] in row.fault]
    assert found
    assert any('"' in row.seen for row in found)  # and the words are quoted


def test_wrong_rows_are_told(there: set[str]) -> None:
    right = Row("a loss", "its shape", "`problem`", '`MismatchError`: "the loss is not per example"', "`test_words`")
    assert right.broken({"test_words"}) == []
    assert right.broken(set()) == ["a loss: no such test: test_words"]
    other = Row("a loss", "its shape", "`nowhere`", '"the loss is per example"', "`test_words`")
    assert other.broken({"test_words"}) == [
        "a loss: no such module: nowhere",
        "a loss: nobody says: 'the loss is per example'",
    ]


def test_the_page_is_in_the_navigation() -> None:
    assert "faults.md" in (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
