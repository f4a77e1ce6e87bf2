"""A page read again: its elements with their attributes, their own text, and where they stand."""

from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

VOID = {"meta", "img", "link", "br"}


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    parents: "list[Element]"
    words: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All text within, with single spaces."""
        return " ".join(" ".join(self.words).split())

    def within(self, **wanted: str) -> bool:
        return any(
            all(parent.attributes.get(name.replace("_", "-")) == value for name, value in wanted.items())
            for parent in self.parents
        )


class Read(HTMLParser):
    """Every element of a page, in order; fails on tags that do not close as they opened."""

    def __init__(self, page: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[Element] = []
        self._open: list[Element] = []
        self.feed(page.read_text(encoding="utf-8"))
        self.close()
        assert not self._open, [element.tag for element in self._open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {name: value or "" for name, value in attrs}, list(self._open))
        self.elements.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self._open
        assert self._open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.words.append(data)

    def all(self, tag: str | None = None, **wanted: str) -> list[Element]:
        names = {name.replace("_", "-"): value for name, value in wanted.items()}
        return [
            element
            for element in self.elements
            if tag in (None, element.tag) and all(element.attributes.get(k) == v for k, v in names.items())
        ]

    def one(self, tag: str | None = None, **wanted: str) -> Element:
        (found,) = self.all(tag, **wanted)
        return found

    def tiles(self, query: str, kind: str) -> list[tuple[int, float]]:
        """(example, score) of the tiles of a query."""
        return [
            (int(tile.attributes["data-example"]), float(tile.attributes["data-score"]))
            for tile in self.all("li", data_kind=kind)
            if tile.within(data_query=query)
        ]

    @property
    def ids(self) -> list[str]:
        return [element.attributes["id"] for element in self.elements if "id" in element.attributes]
