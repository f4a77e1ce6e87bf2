"""Commands run in this process."""

from typing import NamedTuple

from typer.testing import CliRunner

from hydragrad.commands.app import app

TASK = "small_tasks.py:small"


class Printed(NamedTuple):
    output: str
    exception: BaseException | None


def run(*arguments: str, code: int = 0) -> Printed:
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == code, f"exit code {result.exit_code}\n{result.output}\n{result.exception!r}"
    return Printed(result.output, result.exception)
