"""A task is found by its name, and a wrong name is answered with what was there instead."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hydragrad.errors import MismatchError
from hydragrad.tasks.naming import resolve_task
from tests.tasks.small import write_source


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a file of tasks; what importing left behind is taken away again."""
    write_source(tmp_path)
    (tmp_path / "broken.py").write_text("import torch\nsmall = torch.nope\n")
    (tmp_path / "unreadable.py").write_text("small = = 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.startswith("_hydragrad_task_") or name in ("small_tasks", "broken"):
            del sys.modules[name]


def test_ready_tasks() -> None:
    assert resolve_task("digits").name == "digits"
    assert len(resolve_task("digits-flipped").flipped_ids) == 144  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "name", ["small_tasks.py:small", "small_tasks:small", "small_tasks.py:make", "./small_tasks.py:make"]
)
def test_tasks_of_a_file_and_of_a_module(name: str, place: Path) -> None:
    task = resolve_task(name)
    assert (task.name, task.epochs, len(task.train)) == ("small", 2, 20)
    absolute = resolve_task(f"{place / 'small_tasks.py'}:wider")
    assert absolute.build()[0].out_features == 5  # type: ignore[index]


def test_a_file_may_import_its_neighbours(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = place / "elsewhere"
    folder.mkdir()
    write_source(folder, "neighbour_of_tasks.py")
    (folder / "tasks.py").write_text("from neighbour_of_tasks import wider as task\n")
    assert resolve_task("elsewhere/tasks.py:task").name == "small"


def test_files_of_one_name_are_kept_apart(place: Path) -> None:
    folder = place / "other"
    folder.mkdir()
    (folder / "small_tasks.py").write_text(write_source(place).read_text().replace("epochs=2", "epochs=7"))
    assert [resolve_task(f"{p}small_tasks.py:small").epochs for p in ("", "other/", "")] == [2, 7, 2]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("digit", "no task 'digit'.*module:object.*did you mean digits"),
        ("small_tasks.py", "does not say which task.*small_tasks.py:NAME"),
        ("digits:", "no task 'digits:'"),
        ("smal_tasks.py:small", r"no file smal_tasks.py.*holds broken.py, small_tasks.py.*did you mean small_tasks.py"),
        ("nowhere/tasks.py:small", "no file nowhere/tasks.py.*Got: no nowhere"),
        ("smal_tasks:small", "no module 'smal_tasks'.*did you mean small_tasks"),
        ("os.nowhere:small", r"os.nowhere cannot be imported.*ModuleNotFoundError"),
        ("small_tasks.py:smal", r"no 'smal'.*tasks: small, wider, .*squared.*did you mean small"),
        ("small_tasks.py:eleven", "eleven is not a task.*Got: int"),
        ("small_tasks.py:no_task", "no_task is not a task.*a function that returned str"),
        ("small_tasks.py:needs_more", "needs_more did not make a task.*TypeError.*'size'"),
        ("small_tasks.py:breaks", r"breaks did not make a task.*ZeroDivisionError.*small_tasks.py, line \d+"),
        ("broken.py:small", r"broken.py cannot be imported.*AttributeError.*nope"),
        ("broken:small", r"the module broken cannot be imported.*AttributeError.*nope"),
        ("unreadable.py:small", r"unreadable.py cannot be imported.*SyntaxError.*line 1"),
    ],
)
def test_wrong_names_are_answered(name: str, words: str) -> None:
    with pytest.raises(MismatchError, match=words):
        resolve_task(name)
    assert not [
        module for module in sys.modules if module.startswith(("_hydragrad_task_broken", "_hydragrad_task_unr"))
    ]
