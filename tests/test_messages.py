"""The page of messages names every refusal there is in the source, as it begins."""

import ast
from pathlib import Path

from tests.messages_table import PAGE, page, refusals, words

SOURCE = """
def f(x, given):
    told = f"the {x} is wrong" if x else "nothing was given"
    if given:
        raise MismatchError(message("no such step", expected=1))
    raise StoreError(message(told))
"""


def test_the_page_is_that_of_the_source() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.messages_table writes it anew"


def test_messages_are_read_with_their_errors_and_both_branches(tmp_path: Path) -> None:
    (tmp_path / "source.py").write_text(SOURCE)
    assert sorted(refusals(tmp_path / "source.py")) == [
        ("MismatchError", "no such step"),
        ("StoreError", "nothing was given"),
        ("StoreError", "the ... is wrong"),
    ]


def test_what_is_no_literal_has_no_words() -> None:
    assert words(ast.parse("f(x)", mode="eval").body) is None


def test_the_page_holds_what_users_really_see(repository: Path) -> None:
    told = PAGE.read_text(encoding="utf-8")
    for row in (
        "| `MismatchError` | the loss is not per example | `problem` |",
        "| `UnsupportedError` | module ... is a SyncBatchNorm | `hypergradient.sweeping` |",
        "| `NonFiniteError` | ... is not finite | `trajectory.finite` |",
    ):
        assert row in told
    assert "(messages.md)" in (repository / "docs" / "faults.md").read_text(encoding="utf-8")
