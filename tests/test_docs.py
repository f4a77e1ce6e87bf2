"""The examples of the documentation run as printed.

Every ```python block of the README and of docs/ is run, those of one file in order and in one namespace, in an empty
folder. A block right after the comment `<!-- not run -->` is left out.
"""

import re
import textwrap
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [page for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))] if page.exists()]
NOT_RUN = "<!-- not run -->"
FENCE = re.compile(r"^(?P<indent>\s*)(?P<fence>`{3,}|~{3,})\s*(?P<language>\w*)")


@dataclass(frozen=True)
class Block:
    line: int  # of the first line of code, from 1
    code: str


def python_blocks(text: str) -> Iterator[Block]:
    """The blocks to run, in order."""
    previous, fence, language, start, lines = "", "", "", 0, list[str]()
    skip = False
    for number, line in enumerate(text.splitlines(), start=1):
        if fence:
            if line.strip().startswith(fence) and not line.strip(fence[0] + " "):
                if language == "python" and not skip:
                    yield Block(start, textwrap.dedent("\n".join(lines)))
                fence, previous = "", ""
            else:
                lines.append(line)
        elif opening := FENCE.match(line):
            fence, language, start, lines = opening["fence"], opening["language"], number + 1, []
            skip = previous == NOT_RUN
        elif line.strip():
            previous = line.strip()
    if fence:
        raise ValueError(f"the block that opens before line {start} is never closed")


def run_page(page: Path) -> None:
    """Runs the blocks of one page; a failure names the page, the line and the statement."""
    namespace = {"__name__": "__main__"}
    text = page.read_text(encoding="utf-8")
    for block in python_blocks(text):
        try:
            # Empty lines ahead of the code give it the line numbers of the page.
            exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), namespace)
        except Exception as error:
            lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(page)]
            line = (error.lineno if isinstance(error, SyntaxError) else lines[-1] if lines else None) or block.line
            statement = text.splitlines()[line - 1].strip()
            raise AssertionError(f"{page.name}:{line}: `{statement}`\n{type(error).__name__}: {error}") from error


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_page(page)


def test_blocks_are_found_with_their_lines():
    page = textwrap.dedent(
        f"""\
        ```python
        a = 1
        ```
        {NOT_RUN}
        ```python
        absent()
        ```
        ```text
        words
        ```
        1. a list

            ```python title="indented"
            if a:
                b = 2
            ```
        ````md
        ```python
        shown()
        ```
        ````
        """
    )
    assert list(python_blocks(page)) == [Block(2, "a = 1"), Block(14, "if a:\n    b = 2")]


@pytest.mark.parametrize(
    ("code", "line", "reason"),
    [
        ("assert one == 1\nassert one == 2", 6, "AssertionError"),
        ("def f():\n    return 1 / 0\nf()", 6, "ZeroDivisionError: division by zero"),
        ("one = 1\none +", 6, "SyntaxError"),
    ],
)
def test_failures_name_file_and_line(tmp_path: Path, code: str, line: int, reason: str):
    page = tmp_path / "page.md"
    page.write_text(f"```python\none = 1\n```\n```python\n{code}\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=rf"^page\.md:{line}: (?s:.*){reason}"):
        run_page(page)


def test_unclosed_block_is_refused():
    with pytest.raises(ValueError, match="line 2 is never closed"):
        list(python_blocks("```python\na = 1\n"))
