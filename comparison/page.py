"""`python -m comparison.page`: docs/comparison.md and its picture, from what is kept in comparison/results.json."""

from pathlib import Path
from typing import Any

from comparison.exchange import write_text
from comparison.figure import figure
from comparison.results import ROOT, load
from comparison.table import among_all, costs, findings, summary, table

WORDS = Path(__file__).parent / "page.md"
PAGE = ROOT / "docs" / "comparison.md"
PICTURE = ROOT / "docs" / "images" / "comparison.png"


def page(results: dict[str, Any]) -> str:
    """The words of page.md with the tables in their places."""
    tasks = results["tasks"]
    parts = {
        "machines": machines(results["machines"]),
        "summary": summary(tasks),
        "findings": findings(tasks),
        "among_all": among_all(tasks),
        "costs": costs(tasks),
        "tables": "\n".join(table(name, task) for name, task in tasks.items()),
    }
    text = WORDS.read_text(encoding="utf-8")
    for name, part in parts.items():
        text = text.replace("{{" + name + "}}", part)
    return text


def machines(names: list[str]) -> str:
    """In words; costs that were not measured on the first are marked."""
    others = f"; times marked † were measured on {' or '.join(names[1:])}" if names[1:] else ""
    return names[0] + others


def main() -> None:
    results = load()
    write_text(PAGE, page(results))
    figure(results["tasks"], PICTURE)
    print(f"written to {PAGE} and {PICTURE}")


if __name__ == "__main__":
    main()
