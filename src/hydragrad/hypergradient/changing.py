"""Which buffers training changes: those that a sweep carries from step to step instead of taking them for constants."""

import torch

from hydragrad.run import Run, kept_random_state
from hydragrad.trajectory.replay import Replayer
from hydragrad.trajectory.state import State
from hydragrad.trajectory.store import Trajectory
from hydragrad.trajectory.writes import Writes


def changed_buffers(run: Run, replayer: Replayer, stop: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the buffers that training changes before step ``stop``: float ones, which carry derivatives; others.

    Two states do not tell: a pointer into a queue is back where it began after whole rounds, yet every forward pass
    moves it. So a buffer counts that is written to in the first step, or in those replayed on the way to ``stop``, or
    that differs in any stored state.
    """
    trajectory = run.trajectory
    first = trajectory.state(0).buffers
    names = [name for name in trajectory.manifest.buffers if name in first]  # in the model's order
    if not names:
        return (), ()
    changed = set[str]()
    with kept_random_state():
        replayer.restore(trajectory.state(0))
        before = Writes(replayer.module)
        replayer.advance(trajectory.steps[0], compare=False)
        changed |= before.since()
        last = go_to(trajectory, replayer, stop, changed)

    def compare(state: State) -> None:
        changed.update(n for n in first if n not in changed and not torch.equal(first[n].cpu(), state.buffers[n].cpu()))

    compare(last)
    for step in trajectory.checkpoints:
        if 0 < step < stop and not changed >= {*names}:
            compare(trajectory.state(step))
    carried = tuple(name for name in names if name in changed and first[name].is_floating_point())
    return carried, tuple(name for name in names if name in changed and name not in carried)


def go_to(trajectory: Trajectory, replayer: Replayer, step: int, written: set[str] | None = None) -> State:
    """The state before a step, replayed from the nearest stored one; ``written`` gets what was written to meanwhile."""
    start = trajectory.nearest(step)
    replayer.restore(trajectory.state(start))
    before = Writes(replayer.module)
    for record in trajectory.steps[start:step]:
        replayer.advance(record)
    if written is not None:
        written |= before.since()
    return replayer.state()
