"""``python -m tests.messages_table`` writes docs/messages.md: how every refusal begins, read from the source."""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "messages.md"
HEAD = """# Messages

How every refusal begins, by the place that raises it: what to search for. After these words each says what was
expected, what was got, the likely cause and the remedy. `...` stands for names and numbers of the run at hand.
What brings these about, and the tests that do, is on the page of [faults](faults.md).
Written by `python -m tests.messages_table`.

| error | the message begins | module |
|---|---|---|
"""


def words(node: ast.AST) -> str | None:
    """A literal's text, with ... for what is filled in; None for what is no literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(str(part.value) if isinstance(part, ast.Constant) else "..." for part in node.values)
    return None


def texts(node: ast.expr, names: dict[str, list[ast.expr]]) -> Iterator[str]:
    """What the first argument of a message may be: both branches of a choice, every value given to a name."""
    if isinstance(node, ast.IfExp):
        yield from texts(node.body, names)
        yield from texts(node.orelse, names)
    elif isinstance(node, ast.Name):
        for value in names.get(node.id, []):
            yield from texts(value, {})
    elif (told := words(node)) is not None:
        yield told


def refusals(path: Path) -> Iterator[tuple[str, str]]:
    """(error, first words) of every message in a file; the error is that of the statement around it, if it raises."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            names.setdefault(node.targets[0].id, []).append(node.value)
    raised = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and isinstance(node.exc.func, ast.Name):
            raised |= {id(inner): node.exc.func.id for inner in ast.walk(node.exc)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "message" and node.args:
            for told in texts(node.args[0], names):
                yield raised.get(id(node), "HydragradError"), told


def page() -> str:
    """The whole page."""
    rows = set()
    for path in sorted((ROOT / "src" / "hydragrad").rglob("*.py")):
        module = path.relative_to(ROOT / "src" / "hydragrad").with_suffix("").as_posix().replace("/", ".")
        for error, told in refusals(path):
            plain = " ".join(told.split()).replace("|", "\\|").replace("<", "&lt;").replace("*", "\\*")
            if plain.strip(". "):
                rows.add((module, error, plain))
    return HEAD + "".join(f"| `{error}` | {told} | `{module}` |\n" for module, error, told in sorted(rows))


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"written: {PAGE}")
