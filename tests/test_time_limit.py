"""A test run that stops in time says what it left out, and is no success when it left out everything."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.time_limit import REASON, VARIABLE, TimeLimit, limit

# Two tests in a folder of their own; while the first runs, the time comes to its end.
FILES = {
    "conftest.py": """
import pytest
from tests.time_limit import TimeLimit

LIMIT = TimeLimit({until})

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


def run(repository: Path, folder: Path, until: str) -> tuple[int, str]:
    for name, text in FILES.items():
        (folder / name).write_text(text.format(until=until))
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "--rootdir", str(folder), str(folder)]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout + done.stderr


def test_what_would_begin_too_late_is_skipped_and_counted(repository, tmp_path):
    status, said = run(repository, tmp_path, "float('inf')")
    assert status == 0, said
    assert "1 test(s) were NOT run, 1 were" in said
    assert "it ran" not in said


def test_a_run_that_got_to_nothing_is_no_success(repository, tmp_path):
    status, said = run(repository, tmp_path, "0.0")
    assert status == pytest.ExitCode.NO_TESTS_COLLECTED, said
    assert "2 test(s) were NOT run, 0 were" in said


def test_only_the_environment_sets_a_limit(monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    assert limit() == []
    monkeypatch.setenv(VARIABLE, "12.5")
    assert [one.until for one in limit()] == [12.5]
    with pytest.raises(pytest.skip.Exception, match=REASON):
        TimeLimit(12.5).pytest_runtest_setup()
    TimeLimit(time.time() + 3600.0).pytest_runtest_setup()
