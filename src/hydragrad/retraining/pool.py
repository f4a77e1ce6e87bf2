"""Many retrainings: one after another here, or side by side through joblib, whatever stands behind it."""

import hashlib
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from hydragrad.errors import UnsupportedError, message
from hydragrad.retraining.counterfactual import Change
from hydragrad.retraining.measuring import Outcome, Question, Retrainer, threads_set

Numbered = tuple[int, Change]

_LOCAL = threading.local()
_OF_FILES = "_hydragrad_task_"
"""Modules that were made of a file by its path: workers cannot import them by name."""


def workers(jobs: int | None) -> int | None:
    """How many retrainings run side by side; None: in this process, one after another.

    ``jobs``: None: as an ambient ``joblib.parallel_config`` says, else 1; -1: all cores. Raises UnsupportedError.
    """
    if jobs == 1:
        return None
    if jobs == 0 or not isinstance(jobs, int | None):
        raise UnsupportedError(message("no such number of jobs", expected="1, 2, ... or -1 (all cores)", got=jobs))
    if jobs is None and not _ambient():
        return None
    return _joblib().effective_n_jobs(jobs)


def outcomes(
    retrainer: Retrainer, changes: Sequence[Numbered], *, jobs: int | None, threads: int, early: bool
) -> Iterator[tuple[int, Outcome]]:
    """``(number, outcome)`` of every numbered change, in the order in which they are done."""
    if workers(jobs) is None:
        for number, change in changes:
            yield number, retrainer.outcome(change, early=early, threads=threads)
        return
    joblib = _joblib()
    payload = _pickled(retrainer.question)
    key = hashlib.sha256(payload).hexdigest()
    tasks = (joblib.delayed(_work)(payload, key, number, change, early, threads) for number, change in changes)
    backend = joblib.parallel.get_active_backend()[0]
    lazy = getattr(backend, "supports_return_generator", False)
    parallel = joblib.Parallel(n_jobs=jobs, batch_size=1, return_as="generator_unordered" if lazy else "list")
    with threads_set(threads):  # what threads of this process start with; other processes set their own
        yield from parallel(tasks)


def _work(payload: Any, key: str, number: int, change: Change, early: bool, threads: int) -> tuple[int, Outcome]:
    """In a worker: the question is unpacked once for all changes."""
    if getattr(_LOCAL, "key", None) != key:
        import pickle

        _LOCAL.retrainer, _LOCAL.key = Retrainer(pickle.loads(memoryview(payload))), key
    return number, _LOCAL.retrainer.outcome(change, early=early, threads=threads)


def _pickled(question: Question) -> Any:
    """The question as bytes in an array, which joblib's backends share between tasks, not sending it each time."""
    import cloudpickle
    import numpy as np

    for name, module in list(sys.modules.items()):
        if name.startswith(_OF_FILES) and name not in cloudpickle.list_registry_pickle_by_value():
            cloudpickle.register_pickle_by_value(module)
    try:
        return np.frombuffer(cloudpickle.dumps(question), np.uint8)
    except Exception as error:  # whatever the user's own objects raise
        raise UnsupportedError(
            message(
                "the problem cannot travel to workers",
                expected="a model, loss, data, measurement and queries that can be pickled",
                got=f"{type(error).__name__}: {error}",
                remedy="define them at the top of a module, or choose jobs=1",
            )
        ) from error


def _ambient() -> bool:
    """Whether the surroundings chose a backend: whoever did so has imported joblib."""
    if "joblib" not in sys.modules:
        return False
    backend, jobs = sys.modules["joblib"].parallel.get_active_backend()
    return jobs not in (None, 1) or type(backend).__name__ != "LokyBackend"


def _joblib() -> Any:
    try:
        import cloudpickle  # noqa: F401
        import joblib
    except ImportError as error:
        raise UnsupportedError(
            message(
                "several jobs need joblib and cloudpickle, which are not installed",
                remedy="pip install 'hydragrad[parallel]', or choose jobs=1",
            )
        ) from error
    return joblib


def default_threads(jobs: int | None) -> int:
    """One thread each where several retrainings run side by side, else torch's own number."""
    return torch.get_num_threads() if workers(jobs) is None else 1
