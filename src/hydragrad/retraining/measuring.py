"""What is measured of a retrained model, and everything that this takes in one piece that can travel to a worker."""

import contextlib
import platform
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, final

import torch
from torch import Tensor, nn

from hydragrad.files import sha256
from hydragrad.hypergradient.queries import Columns, Queries
from hydragrad.problem import Problem
from hydragrad.retraining.counterfactual import Change, retrained
from hydragrad.run import Run
from hydragrad.shapes import Float
from hydragrad.trajectory.digests import batch_digests
from hydragrad.trajectory.identity import identity
from hydragrad.trajectory.state import State
from hydragrad.trajectory.store import Trajectory

Measurement = Callable[[nn.Module, Any], Tensor]


class Values(Protocol):
    """What is measured of a state, where it is not each query's loss: ``values(run)(state)`` gives one number a query.

    ``description``: plain values that tell it from others. Picklable.
    """

    @property
    def description(self) -> dict[str, Any]: ...

    def __call__(self, run: Run) -> Callable[[State], Tensor]: ...


_RANDOM = threading.Lock()
"""torch's random state is one for all threads: steps that draw from it are replayed one run at a time."""


@final
@dataclass(frozen=True)
class Outcome:
    """One retrained model: ``values`` float64 [M], ``hits`` float64 [queries] (0 or 1) if asked, ``seconds``.

    ``bitwise``: the model is the recorded one, bit for bit.
    """

    values: Tensor
    hits: Tensor | None
    seconds: float
    bitwise: bool


@final
@dataclass(frozen=True)
class Question:
    """Everything that decides the outcome of a change, and nothing else. Picklable if the user's parts are.

    ``values``: measured in place of the queries' losses (or of ``measurement``).
    """

    folder: Path
    problem: Problem
    queries: Any
    columns: Columns
    until: int
    measurement: Measurement | None = None
    accuracy: Measurement | None = None
    values: Values | None = None


@final
class Retrainer:
    """Answers one question for any change; lives in one thread."""

    def __init__(self, question: Question, run: Run | None = None) -> None:
        self.question = question
        self.run = Run(question.problem, Trajectory(question.folder)) if run is None else run
        asked = question.values(self.run) if question.values else None
        self._asked = asked or queries_of(self.run, question.queries, question.measurement).values
        self._told = queries_of(self.run, question.queries, question.accuracy) if question.accuracy else None
        self._random = any(step.random for step in self.run.steps[: question.until])

    def outcome(self, change: Change, *, early: bool, threads: int) -> Outcome:
        """Retrain under ``change`` with this many threads, and measure."""
        began = time.perf_counter()
        with threads_set(threads), _RANDOM if self._random else contextlib.nullcontext():
            state = retrained(self.run, change, self.question.until, early=early)
            values = self.measured(state)
            hits = None if self._told is None else self._told.values(state).double().cpu()
        return Outcome(values, hits, time.perf_counter() - began, self._is_recorded(state))

    def measured(self, state: State) -> Float[Tensor, " M"]:
        """The columns of the question at a state."""
        columns = self.question.columns
        values = self._asked(state).double().cpu()
        total = torch.zeros(columns.count, dtype=torch.float64)
        return total.index_add_(0, columns.of, values * columns.factor.double())

    def _is_recorded(self, state: State) -> bool:
        if state.step not in self.run.trajectory.checkpoints:
            return True  # nothing says otherwise: the replay compared its gradients
        recorded = self.run.trajectory.state(state.step)
        pairs = [(recorded.params, state.params), (recorded.buffers, state.buffers)]
        return all(torch.equal(a[name], b[name].cpu()) for a, b in pairs for name in a)

    @cached_property
    def description(self) -> dict[str, Any]:
        """Plain values that tell this question from others (the code of a measurement only by its name)."""
        question = self.question
        of_columns = torch.stack([question.columns.of.double(), question.columns.factor.double()])
        return {
            "run": identity(self.run.steps),
            "step": question.until,
            "queries": _digest(self.run, question.queries),
            "columns": sha256(of_columns.numpy().tobytes()),
            "measurement": _name(question.measurement),
            "accuracy": _name(question.accuracy),
            **({"values": question.values.description} if question.values else {}),
            "torch": torch.__version__,
            "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
            "device": str(device_of(self.run)),
        }


@contextlib.contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """Give torch this many threads for a while: the bits of a replay depend on it."""
    before = torch.get_num_threads()
    if before == threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def queries_of(run: Run, data: Any, measurement: Measurement | None = None) -> Queries:
    """The queries of a run, made ready."""
    manifest = run.trajectory.manifest
    return Queries(run.problem, data, tuple(manifest.params), measurement, device_of(run), manifest.collate["mode"])


def device_of(run: Run) -> torch.device:
    """Where the run's model lies."""
    return next((parameter.device for parameter in run.problem.model.parameters()), torch.device("cpu"))


def losses_at(run: Run, state: State, data: Any) -> Float[Tensor, " M"]:
    """The loss of each example of ``data`` with the parameters of ``state``, in evaluation mode, on the CPU."""
    return queries_of(run, data).values(state).cpu()


def _digest(run: Run, data: Any) -> str:
    collate = run.problem.collate
    if run.trajectory.manifest.collate["mode"] != "samples":
        return f"{len(data)} queries"
    parts = [
        batch_digests(collate([data[i] for i in range(first, min(first + 64, len(data)))]), min(64, len(data) - first))
        for first in range(0, len(data), 64)
    ]
    return sha256(torch.cat(parts).cpu().numpy().tobytes())


def _name(function: Measurement | None) -> str | None:
    if function is None:
        return None
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', type(function).__qualname__)}"
