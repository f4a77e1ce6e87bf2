"""How the command line refuses, is interrupted, and says what it is."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import hydragrad as hg
from hydragrad.cli import main
from hydragrad.commands.app import app
from hydragrad.retraining.ledger import Ledger
from tests.commands.running import TASK, run


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("verify", "RUN", "--task", "digit"), "MismatchError: no task 'digit'"),
        (("verify", "RUN", "--task", "small_tasks.py:wider"), "shape of parameter '0.weight' differs"),
        (("attribute", "RUN", "--task", "small_tasks.py:squared"), "gradient"),
        (("attribute", "RUN", "--task", "digits"), "parameters are not the recorded ones"),
        (("validate", "RUN", "--task", TASK, "--scores", "no-scores"), "StoreError: no-scores is missing"),
        (("report", "RUN", "--task", TASK, "--scores", "no-scores"), "StoreError: no-scores is missing"),
        (("report", "RUN", "--task", TASK, "--scores", "small_tasks.py"), "StoreError: small_tasks.py cannot be read"),
        (("attribute", "elsewhere", "--task", TASK), "StoreError: no recorded run in elsewhere"),
        (("attribute", "small_tasks.py", "--task", TASK), "no recorded run in small_tasks.py. Expected: a folder"),
        (("validate", "RUN", "--task", TASK, "--scores", "RUN"), "is a folder. Expected: a file."),
        (("train", "small_tasks.py:eleven", "--out", "x"), "eleven is not a task"),
        (("train", "small_tasks.py:three", "--out", "x"), "do not take its training data"),
        (
            ("train", "small_tasks.py:doubles", "--out", "x"),
            "the batch holds [0]: float64 [4] each, [1]: int64 [] each",
        ),
        (("train", "small_tasks.py:beyond", "--out", "x"), "IndexError: Target 3 is out of bounds; the batch holds"),
        (("train", "small_tasks.py:nothing", "--out", "x"), "task 'small' has no training examples"),
        (("train", "small_tasks.py:classy", "--out", "x"), "optimizer of task 'small' makes none"),
        (("train", "small_tasks.py:instance", "--out", "x"), "model of task 'small' is a module"),
    ],
)
def test_refusals_are_a_message_and_exit_code_1(trained: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run(*(str(trained) if word == "RUN" else word for word in arguments), code=1)
    assert words in result.output
    assert "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("attribute", "RUN", "-t", TASK, "--query", "10"), "10 is no test example: 0 to 9"),
        (("attribute", "RUN", "-t", TASK, "--out", "."), "name a file"),
        (("attribute", "RUN", "-t", TASK, "--method", "guess"), "gauss-newton"),
        (("attribute", "RUN"), "--task"),
        (("mislabels", "RUN", "-t", TASK, "--out", "."), "name a file"),
        (("mislabels", "RUN", "-t", TASK, "--out", "suspects.xlsx"), "is written as CSV"),
        (("mislabels", "RUN", "-t", TASK, "--signal", "vibes"), "el2n"),
        (("validate", "RUN", "-t", TASK, "--scores", "s", "--out", "."), "name a file"),
        (("validate", "RUN", "-t", TASK, "--scores", "s", "--plot", "."), "name a file"),
        (("validate", "RUN", "-t", TASK, "--scores", "s", "--metric", "lds"), "subset"),
        (("report", "RUN", "-t", TASK), "--scores"),
        (("report", "RUN", "-t", TASK, "--scores", "s", "--query", "9999"), "9999 is no test example: 0 to 9"),
        (("report", "RUN", "-t", TASK, "--scores", "s", "--out", "."), "name a file"),
        (("train", TASK), "--out"),
        (("frobnicate",), "frobnicate"),
    ],
)
def test_wrong_usage_is_exit_code_2_before_any_work(
    trained: Path, arguments: tuple[str, ...], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("work began")

    monkeypatch.setattr("hydragrad.commands.app.attribute_run", never)
    monkeypatch.setattr("hydragrad.commands.app.plan", never)
    monkeypatch.setattr("hydragrad.commands.proving.validate_scores", never)
    monkeypatch.setattr("hydragrad.commands.suspicion.find_mislabels", never)
    monkeypatch.setattr("hydragrad.commands.reporting.write_report", never)
    result = run(*(str(trained) if word == "RUN" else word for word in arguments), code=2)
    assert words in result.output


def test_the_folder_at_hand_is_named_in_full(folder: Path) -> None:
    assert f"no recorded run in {folder}. Expected" in run("attribute", ".", "--task", TASK, code=1).output


def test_training_without_test_examples_and_one_that_diverges_say_so(folder: Path) -> None:
    assert "no test examples: nothing to ask about" in run("train", "small_tasks.py:untested", "--out", "a").output
    assert "mean test loss nan: the run diverged" in run("train", "small_tasks.py:holes", "--out", "b").output


@pytest.mark.parametrize("task", ["narrow", "texts", "ragged"])
@pytest.mark.parametrize("command", ["attribute", "validate", "report", "mislabels"])
def test_queries_that_the_model_cannot_take_are_refused(trained: Path, task: str, command: str) -> None:
    hg.Attribution(
        torch.zeros(20, 10), torch.arange(20), torch.arange(10), "exact", hg.Diagnostics("exact", 1, 0, 1, 0, 1, "")
    ).save("scores")
    more = {"attribute": (), "mislabels": ("--signal", "harm")}.get(command, ("--scores", "scores"))
    refused = run(command, str(trained), "-t", f"small_tasks.py:{task}", *more, code=1).output
    assert "MismatchError: queries 0 to 7 cannot be measured" in refused
    assert "Traceback" not in refused


@pytest.mark.parametrize(
    ("command", "option"),
    [
        ("attribute", "--out"),
        ("validate", "--out"),
        ("validate", "--plot"),
        ("report", "--out"),
        ("mislabels", "--out"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    trained: Path, command: str, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hydragrad.tasks.task.Task.load", lambda *_: pytest.fail("work began"))
    Path("file").touch()
    more = ("--scores", "scores") if command in ("validate", "report") else ()
    refused = run(command, str(trained), "-t", TASK, *more, option, "file/x", code=1).output
    assert "StoreError: cannot write file/x" in refused
    left = {path.name for path in Path().iterdir()} - {"__pycache__"}  # Python's, of the user's file
    assert left == {"file", "runs", "small_tasks.py"}, "nothing is left"


def test_an_interrupt_is_a_sentence_and_keeps_what_is_finished(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run("attribute", str(trained), "-t", TASK, "--out", "scores")
    asked = ("validate", str(trained), "-t", TASK, "--scores", "scores", "-n", "5", "--resume", "kept")
    real, count = Ledger.put, []

    def put(self: Ledger, *outcome: Any) -> None:
        real(self, *outcome)
        count.append(1)
        if len(count) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "put", put)
    stopped = run(*asked, code=130)
    assert "stopped: files that were written are whole" in stopped.output
    assert "Traceback" not in stopped.output
    assert "3 of them kept from before" in run(*asked).output


def test_errors_in_the_library_itself_keep_their_traceback(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("hydragrad.commands.app.verify_run", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        CliRunner().invoke(app, ["verify", str(trained), "-t", TASK], catch_exceptions=False)


def test_version_and_help() -> None:
    assert run("--version").output.strip() == f"hydragrad {hg.__version__}"
    assert "hydragrad train digits --out runs/digits" in run("--help").output
    for command in ("demo", "train", "attribute", "validate", "mislabels", "report", "verify"):
        assert f"hydragrad {command}" in run(command, "--help").output, "each help has an example"


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_a_missing_package_is_named_with_its_extra(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [module for module in sys.modules if module.startswith("hydragrad.commands")]:
        monkeypatch.delitem(sys.modules, name)
    names = [module for module in sys.modules if module.partition(".")[0] == missing]
    for name in names:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [_Absent(missing), *sys.meta_path])
    with pytest.raises(SystemExit, match=rf"needs {missing}.*pip install 'hydragrad\[cli\]'"):
        main()


class _Absent:
    """An importer that says of one package that it is not installed."""

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(self, name: str, path: object = None, target: object = None) -> None:
        if name.partition(".")[0] == self.package:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
