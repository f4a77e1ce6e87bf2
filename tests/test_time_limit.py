"""A test run that stops in time says what it left out, and is no success when it left out everything."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.time_limit import VARIABLE, limit

# Two tests in a folder of their own; while the first runs, the time comes to its end.
FILES = {
    "conftest.py": """
import pytest
from tests.time_limit import TimeLimit

LIMIT = TimeLimit({until}, least={least})

@pytest.fixture
def limit():
    return LIMIT

def pytest_configure(config):
    config.pluginmanager.register(LIMIT)
""",
    "test_two.py": """
def test_one(limit):
    limit.until = 0.0

def test_two():
    raise AssertionError("it ran")
""",
}


def run(repository: Path, folder: Path, until: str, *options: str, least: str = "0.0") -> tuple[int, str]:
    for name, text in FILES.items():
        (folder / name).write_text(text.format(until=until, least=least))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--rootdir", str(folder), *options]
    outside = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run([*command, str(folder)], cwd=repository, env=outside, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "worker"])
def test_what_would_begin_too_late_is_passed_by_and_counted(repository, tmp_path, options):
    status, said = run(repository, tmp_path, "float('inf')", *options)
    assert status == 0, said
    assert "1 test(s) were NOT run, 1 were" in said
    assert "it ran" not in said


@pytest.mark.parametrize("options", [(), ("-n", "1")], ids=["alone", "worker"])
def test_a_run_that_got_to_nothing_is_no_success(repository, tmp_path, options):
    status, said = run(repository, tmp_path, "0.0", *options)
    assert status == pytest.ExitCode.NO_TESTS_COLLECTED, said
    assert "2 test(s) were NOT run, 0 were" in said


def test_a_late_start_leaves_some_time(repository, tmp_path):
    status, said = run(repository, tmp_path, "0.0", least="1e9")
    assert status == 0, said
    assert "1 test(s) were NOT run, 1 were" in said


def test_only_the_environment_sets_a_limit(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert limit() == []
    monkeypatch.setenv(VARIABLE, "12.5")
    assert [one.until for one in limit()] == [12.5]
