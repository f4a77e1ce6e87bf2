"""Does replay reproduce the recorded run? Bit for bit, or how far off, and why."""

from dataclasses import dataclass, field
from typing import final

from hydragrad.errors import MismatchError, NonFiniteError
from hydragrad.run import Run, kept_random_state
from hydragrad.trajectory.agreement import state_difference, tolerance
from hydragrad.trajectory.ending import moved_on
from hydragrad.trajectory.explaining import explain_state
from hydragrad.trajectory.finite import check_finite
from hydragrad.trajectory.repeating import Nondeterminism, repeated
from hydragrad.trajectory.replay import Replayer
from hydragrad.trajectory.sparing import suspects
from hydragrad.trajectory.surroundings import differing


@final
@dataclass(frozen=True)
class Verification:
    """What ``verify`` found; true if ``ok``.

    ``exact``: every gradient and checkpoint was equal bit for bit, and no buffer changed after the last step;
    ``drift``: checkpoint step -> largest relative difference of a tensor; ``first_difference``: the first step whose
    gradient (or data) differed;
    ``nondeterminism``: what differs when that step is repeated (None: nothing, or no need to look); ``reasons``: words.
    """

    ok: bool
    exact: bool
    steps: int
    drift: dict[int, float] = field(default_factory=dict)
    first_difference: int | None = None
    reasons: tuple[str, ...] = ()
    nondeterminism: Nondeterminism | None = None

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.exact:
            head = f"exact: {self.steps} steps replayed bit for bit"
        elif self.ok:
            head = f"ok: {self.steps} steps replayed to rounding, largest drift {max(self.drift.values()):.2g}"
        else:
            head = f"failed: the replay is not the recorded run ({self.steps} steps replayed)"
        apart = ", ".join(f"step {step} {value:.2g}" for step, value in self.drift.items() if value)
        lines = [f"- drift at the checkpoints (0 where not named): {apart}"] if apart else []
        return "\n".join([head, *lines, *(f"- {reason}" for reason in self.reasons)])


def verify(run: Run) -> Verification:
    """Replay the whole run from its first state and compare every batch, gradient and stored checkpoint.

    Never raises for a difference: it is in the result, in words. Example: ``assert verify(run), verify(run)``.
    """
    replayer = run.replayer(check=True)
    drift, reasons, done = {}, [], 0
    first: int | None = None
    meddled = ""
    limit = max((tolerance(param.dtype) for param in run.problem.model.parameters()), default=0.0)

    def compare(step: int) -> str:
        recorded, replayed = run.trajectory.state(step), replayer.state()
        drift[step] = state_difference(recorded, replayed)
        if drift[step] <= limit or replayer.differences or meddled:
            return ""
        return explain_state(recorded, replayed, run.trajectory.nearest(step - 1))

    with kept_random_state():
        for step in run.steps:
            if step.index in run.trajectory.checkpoints:
                meddled = compare(step.index) or meddled
            try:
                replayer.advance(step)
            except MismatchError as error:
                first = step.index
                reasons.append(str(error))
                break
            done += 1
    if done == run.num_steps and done in run.trajectory.checkpoints:
        meddled = compare(done) or meddled
    first = min(replayer.differences, default=first)
    exact = first is None and not any(drift.values())
    apart = [step for step, value in drift.items() if not value <= limit]
    if apart:
        reasons.append(f"the state at step {apart[0]} is off by {drift[apart[0]]:.2g} relative (allowed: {limit:g})")
    unsteady = None
    if meddled:
        reasons.append(meddled)
    elif not exact:
        reasons += _hints(run, replayer, first)
        where = first if first is not None else min(step for step, value in drift.items() if value) - 1
        found = (repeated_step(run, suspect) for suspect in suspects(run.steps, max(where, 0)))
        unsteady = next((one for one in found if one is not None), None)
        reasons.append(str(unsteady) if unsteady is not None else _repeats(max(where, 0)))
    try:
        check_finite(replayer.state(), replayer, run.trajectory)
    except NonFiniteError as error:
        reasons.append(f"the run itself is not finite: {error}")
    ended = moved_on(run.trajectory)
    reasons += [ended] if ended else []
    for step, dropped in run.trajectory.resumptions:
        reasons.append(f"the recording was gone on with at step {step}; {dropped} recorded steps after it were dropped")
    if not run.trajectory.complete:
        reasons.append(f"the recording is incomplete ({run.trajectory.reason}): {run.num_steps} steps were kept")
    ok, exact = done == run.num_steps and not apart and not ended, exact and not ended
    return Verification(ok, exact, done, drift, first, tuple(reasons), unsteady)


def repeated_step(run: Run, step: int) -> Nondeterminism | None:
    """Whether a recorded step can be repeated, from the recorded state nearest before it."""
    replayer = run.replayer(check=False)
    with kept_random_state():
        replayer.restore(run.trajectory.state(run.trajectory.nearest(step)))
        for record in run.steps[replayer.step : step]:
            replayer.advance(record)
        return repeated(replayer, replayer.state(), run.steps[step])


def _repeats(step: int) -> str:
    return f"step {step} can be repeated bit for bit: the difference lies in code, data or machine, not in chance"


def _hints(run: Run, replayer: Replayer, first: int | None) -> list[str]:
    """What is known to differ in the surroundings."""
    hints = differing(run.trajectory.manifest, str(replayer.device))
    if any(step.random for step in run.steps):
        hints.append("random numbers were drawn inside recorded steps (and again in replay, from the same states)")
    if run.trajectory.manifest.extra.get("compiled"):
        hints.append("a compiled model was trained; its replay is not compiled, and rounds otherwise")
    apart = replayer.differences.get(first, 0.0) if first is not None else 0.0
    if not hints and apart <= max(tolerance(param.dtype) for param in run.problem.model.parameters()):
        hints.append("rounding: the loss is computed in another order than it was")
    if apart:
        hints.insert(0, f"gradients differ from step {first} on, there by {apart:.2g} relative")
    return hints
