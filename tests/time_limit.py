"""An end to a test run on a machine so slow that its host would stop it: what is left is counted, and said to be."""

import os
import time
from typing import Any

import pytest

VARIABLE = "HYDRAGRAD_TESTS_UNTIL"
"""Seconds since 1970 after which no test begins; .ci/run sets it, a developer's run has no end."""


class TimeLimit:
    """A pytest plugin: passes by the tests that would begin after ``until``; a run that got to none of them fails.

    There are ``least`` seconds for tests also where what came before them took too long.
    """

    def __init__(self, until: float, least: float = 300.0) -> None:
        self.until, self.least = until, least
        self.left = 0

    def pytest_collection_finish(self) -> None:
        """Before the first test."""
        self.until = max(self.until, time.time() + self.least)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self) -> bool | None:
        """Instead of a test, when the time is up. No report, not even of a skip: thousands would take minutes."""
        if time.time() <= self.until:
            return None
        self.left += 1
        return True

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """After the last test: a worker tells its controller; a run without any test that passed is no success."""
        reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
        if (told := getattr(session.config, "workeroutput", None)) is not None:
            told["left"] = self.left
        elif self.left and not reporter.stats.get("passed"):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        """A worker of pytest-xdist came to its end, with what it told (nothing, if it crashed)."""
        self.left += getattr(node, "workeroutput", {}).get("left", 0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """At the end."""
        if self.left:
            ran = sum(len(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "failed"))
            terminalreporter.section("time was up", red=True)
            terminalreporter.line(f"{self.left} test(s) were NOT run, {ran} were: run `make tests` on a faster machine")


def limit() -> list[TimeLimit]:
    """What the environment asks for: one limit or none."""
    return [TimeLimit(float(os.environ[VARIABLE]))] if VARIABLE in os.environ else []
