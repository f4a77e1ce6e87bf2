"""Time as a machine with nothing else to do would count it."""

import time

SCHEDSTAT = "/proc/thread-self/schedstat"
_TRIES = 10


def quiet_seconds() -> float:
    """A clock that stands still while this thread waits for a processor that other programs hold.

    Linux says how long that was (the second number there, in nanoseconds); elsewhere it is an ordinary clock.
    What it cannot see: caches and memory shared with other programs, and threads beside this one that wait.
    """
    waited, now = _waited(), time.perf_counter()
    for _ in range(_TRIES):
        before, waited = waited, _waited()
        if waited == before:
            break
        now = time.perf_counter()  # the processor was taken away between the readings: the clock would run backwards
    return now - waited


def _waited() -> float:
    try:
        with open(SCHEDSTAT, "rb", buffering=0) as file:
            return int(file.read(100).split()[1]) * 1e-9
    except (OSError, IndexError, ValueError):
        return 0.0
