"""An end to a test run on a machine so slow that its host would stop it: what is left is skipped, and said to be."""

import os
import time
from typing import Any

import pytest

VARIABLE = "HYDRAGRAD_TESTS_UNTIL"
"""Seconds since 1970 after which no test begins; .ci/run sets it, a developer's run has no end."""

REASON = f"not run: the time that {VARIABLE} gives was up"


class TimeLimit:
    """A pytest plugin: skips the tests that would begin after ``until``; a run that got to none of its tests fails."""

    def __init__(self, until: float) -> None:
        self.until = until

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        """Before every test."""
        if time.time() > self.until:
            pytest.skip(REASON)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """At the end, where the reports of all workers have come together."""
        left = len(left_out(terminalreporter.stats))
        if left:
            ran = sum(len(terminalreporter.stats.get(outcome, [])) for outcome in ("passed", "failed"))
            terminalreporter.section("time was up", red=True)
            terminalreporter.line(f"{left} test(s) were NOT run, {ran} were: run `make tests` on a faster machine")

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """After the last test."""
        reporter: Any = session.config.pluginmanager.get_plugin("terminalreporter")
        if reporter is not None and left_out(reporter.stats) and not reporter.stats.get("passed"):
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED


def left_out(stats: dict[str, list[Any]]) -> list[Any]:
    """The reports of tests that were skipped because the time was up."""
    return [report for report in stats.get("skipped", []) if REASON in str(report.longrepr)]


def limit() -> list[TimeLimit]:
    """What the environment asks for: one limit or none."""
    return [TimeLimit(float(os.environ[VARIABLE]))] if VARIABLE in os.environ else []
