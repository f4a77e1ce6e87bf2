"""Child processes for tests: forked with the modules that are loaded already, ended without any clean-up."""

import itertools
import os
import signal
import time
import traceback
import warnings
from collections.abc import Callable

import torch

PATIENCE = 600.0
"""Seconds to wait for another process: the machine may be busy with others."""


def until_killed(pause: float, last: int) -> Callable[..., None]:
    """For a child's loop: takes ``pause`` seconds a call; the ``last`` one waits to be killed, late as that may be."""
    calls = itertools.count(1)

    def wait(*_: object) -> None:
        time.sleep(pause if next(calls) < last else PATIENCE)

    return wait


def fork(work: Callable[[], object]) -> int:
    """Start ``work`` in a child; its process id. Exit status 0: it came to its end; 1: it raised (and was printed)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child uses none
        child = os.fork()
    if child == 0:
        status = 1
        try:
            torch.set_num_threads(1)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return child


def ended(child: int) -> int:
    """Wait for a child; its exit status, or minus the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill(child: int) -> int:
    """SIGKILL, as from a scheduler or for want of memory."""
    os.kill(child, signal.SIGKILL)
    return ended(child)
