"""Before the work: how many retrainings, how many steps of them, how long."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

from hydragrad.retraining.counterfactual import Change, first_replayed
from hydragrad.retraining.measuring import Retrainer, threads_set
from hydragrad.run import kept_random_state

_PROBED_STEPS, _PROBED_SECONDS = 30, 0.5


@final
@dataclass(frozen=True)
class RetrainingPlan:
    """What a validation will do. ``str(plan)`` says it in words.

    ``retrainings``: the replay as trained included; ``kept``: how many of them lie in the resume folder already;
    ``steps``: training steps to be taken in all; ``jobs``: side by side; ``seconds``: predicted from a few steps.
    """

    retrainings: int
    kept: int
    steps: int
    jobs: int
    threads: int
    seconds: float

    def __str__(self) -> str:
        kept = f" ({self.kept} of them kept from before)" if self.kept else ""
        return (
            f"{self.retrainings} retrainings{kept}, {self.steps} steps in all, {self.jobs} at a time with "
            f"{self.threads} thread(s) each: about {_duration(self.seconds)}"
        )


def plan_changes(
    retrainer: Retrainer, changes: Sequence[Change], kept: int, jobs: int | None, threads: int
) -> RetrainingPlan:
    """Times a few replayed steps and one measurement, and adds up what the changes still need."""
    until = retrainer.question.until
    replayer, measured = retrainer.run.replayer(check=True), 0.0
    with threads_set(threads), kept_random_state():
        first = min(1, until)  # the first step also sets torch up
        for step in retrainer.run.steps[:first]:
            replayer.advance(step)
        began = time.perf_counter()
        for step in retrainer.run.steps[first : min(until, first + _PROBED_STEPS)]:
            replayer.advance(step)
            if time.perf_counter() - began > _PROBED_SECONDS:
                break
        per_step = (time.perf_counter() - began) / max(replayer.step - first, 1)
        if changes:
            began = time.perf_counter()
            retrainer.measured(replayer.state())
            measured = time.perf_counter() - began
    steps = sum(until - first_replayed(retrainer.run, change, until) for change in changes)
    seconds = (steps * per_step + len(changes) * measured) / (jobs or 1)
    return RetrainingPlan(len(changes) + kept, kept, steps, jobs or 1, threads, seconds)


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
