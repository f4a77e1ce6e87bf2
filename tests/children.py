"""Child processes for tests: forked with the modules that are loaded already, ended without any clean-up."""

import os
import signal
import traceback
import warnings
from collections.abc import Callable

import torch


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
