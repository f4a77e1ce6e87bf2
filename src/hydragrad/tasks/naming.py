"""From the name of a task, as it is given on the command line, to the task."""

import difflib
import importlib
import importlib.util
import sys
import zlib
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from hydragrad.errors import HydragradError, MismatchError, message
from hydragrad.tasks.digits import digits, flipped_digits
from hydragrad.tasks.fashion import fashion
from hydragrad.tasks.task import Task

READY: dict[str, Callable[[], Task]] = {"digits": digits, "digits-flipped": flipped_digits, "fashion": fashion}
"""Tasks that come with the package."""

FORMS = f"{', '.join(map(repr, READY))}, 'module:object' or 'path/to/file.py:object'"


def resolve_task(name: str) -> Task:
    """The task called ``name``: a ready one, ``module:object`` or ``path/to/file.py:object``.

    The object is a Task, or is called without arguments and returns one. Modules are looked for in the working folder
    too. Raises MismatchError, saying what was found instead.

    Example: ``resolve_task("digits")``.
    """
    if name in READY:
        return READY[name]()
    place, colon, attribute = name.rpartition(":")
    if not colon or not place or not attribute:
        raise MismatchError(_no_such_task(name))
    module = _module_of_file(Path(place)) if _is_file(place) else _module(place)
    return _task_of(name, _attribute(module, place, attribute))


def _is_file(place: str) -> bool:
    return place.endswith(".py") or "/" in place or "\\" in place


def _no_such_task(name: str) -> str:
    if name.endswith(".py"):
        return message(
            f"{name} does not say which task", expected=FORMS, got=repr(name), remedy=f"write {name}:NAME_OF_THE_TASK"
        )
    return message(f"no task {name!r}", expected=FORMS, remedy=_suggestion(name, READY))


def _suggestion(name: str, known: Iterable[str], otherwise: str = "") -> str:
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"did you mean {' or '.join(near)}?" if near else otherwise


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        folder = path.parent
        others = sorted(file.name for file in folder.glob("*.py")) if folder.is_dir() else []
        raise MismatchError(
            message(
                f"no file {path}",
                expected="a Python file that holds the task",
                got=f"{folder} holds {', '.join(others[:8]) or 'no Python file'}"
                if folder.is_dir()
                else f"no {folder}",
                remedy=_suggestion(path.name, others, "give the path relative to the working folder"),
            )
        )
    path = path.resolve()
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # its neighbours, as for a script
    called = f"_hydragrad_task_{path.stem}_{zlib.crc32(str(path).encode()):08x}"
    spec = importlib.util.spec_from_file_location(called, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[called] = module  # dataclasses and workers look their module up
    loader = spec.loader
    try:
        _run_users_code(f"{path} cannot be imported", lambda: loader.exec_module(module))
    except HydragradError:
        del sys.modules[called]
        raise
    return module


def _module(place: str) -> ModuleType:
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))  # a console script does not look there by itself
    try:
        found = importlib.util.find_spec(place) is not None
    except (ImportError, ValueError):
        found = False
    if not found and "." not in place:
        here = [file.stem for file in Path.cwd().glob("*.py")]
        raise MismatchError(
            message(
                f"no module {place!r}",
                expected="a module that Python can import, or a file",
                cause="it is not installed, and not in the working folder",
                remedy=_suggestion(place, here, "for a file write path/to/file.py:object"),
            )
        )
    return _run_users_code(f"the module {place} cannot be imported", lambda: importlib.import_module(place))


def _attribute(module: ModuleType, place: str, attribute: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError:
        public = [name for name in vars(module) if not name.startswith("_")]
        tasks = [name for name in public if isinstance(vars(module)[name], Task)]
        raise MismatchError(
            message(
                f"{place} has no {attribute!r}",
                expected="the name of a Task, or of a function that returns one",
                got=f"tasks: {', '.join(tasks) or 'none'}",
                remedy=_suggestion(attribute, public),
            )
        ) from None


def _task_of(name: str, found: Any) -> Task:
    made = found
    if not isinstance(found, Task) and callable(found):
        made = _run_users_code(f"{name} did not make a task when called without arguments", found)
    if not isinstance(made, Task):
        raise MismatchError(
            message(
                f"{name} is not a task",
                expected="a hydragrad.Task, or a function without arguments that returns one",
                got=type(made).__name__ if made is found else f"a function that returned {type(made).__name__}",
            )
        )
    return made


def _run_users_code(summary: str, code: Callable[[], Any]) -> Any:
    """The code's result; an error of its own is reported with its place, without the way there."""
    try:
        return code()
    except HydragradError:
        raise
    except Exception as error:
        place = error.__traceback__
        while place is not None and place.tb_next is not None:
            place = place.tb_next
        where = f" ({place.tb_frame.f_code.co_filename}, line {place.tb_lineno})" if place is not None else ""
        where = "" if isinstance(error, SyntaxError) else where
        raise MismatchError(message(summary, got=f"{type(error).__name__}: {error}{where}")) from error
