"""How a stretch of steps is revisited backwards with few states: which are kept, how often steps are taken again.

With a state kept before every step a stretch is replayed once. With fewer, a state is kept at a cut, the later part is
revisited first (with a state less), then the earlier part from its start. Cut as in binomial checkpointing (Griewank
and Walther, "Algorithm 799: revolve", ACM TOMS 26, 2000), S states revisit C(S + r - 1, r) steps with none taken more
than r times: every step kept is r = 1, and r grows like the logarithm of the length where S does. What differs from
there: a step's gradient is kept with the state before it, so that the part at hand needs no replay of its own.
"""

import functools
import math
from dataclasses import dataclass
from typing import final

LEAST = 2
"""States that any stretch needs: the one at its start, and that of the step at hand."""


@final
@dataclass(frozen=True)
class Schedule:
    """``slots``: states kept in memory at a time; ``on_disk``: further ones of the stretch at hand, evenly spaced.

    Example: ``Schedule(slots=10).replayed(100) == 253``: C(11, 2) = 55 < 100 <= C(12, 3) = 220, so at most three times.
    """

    slots: int
    on_disk: int = 0

    def pieces(self, length: int) -> list[int]:
        """Lengths of the parts between states on disk (one: none are written), in order.

        The first starts at the checkpoint and the last where the first pass ends, so D states make D + 2 parts.
        """
        count = min(self.on_disk + 2, -(-length // self.slots))  # more would not spare a step
        if self.on_disk == 0 or count < 3:
            return [length]
        return [(k + 1) * length // count - k * length // count for k in range(count)]

    def replayed(self, length: int) -> int:
        """Steps taken to revisit a stretch: the first pass to the last part, and every part by itself."""
        pieces = self.pieces(length)
        return sum(pieces[:-1]) + sum(taken(piece, self.slots) for piece in pieces)

    def written(self, length: int) -> int:
        """States written to disk, and read again, for a stretch."""
        return max(0, len(self.pieces(length)) - 2)

    def times(self, length: int) -> int:
        """How often a step of the stretch is taken at most."""
        pieces = self.pieces(length)
        return times(max(pieces), self.slots) + (len(pieces) > 1)


def reach(slots: int, times: int) -> int:
    """Steps that ``slots`` states revisit with none taken more than ``times`` times: C(slots + times - 1, times)."""
    return math.comb(slots + times - 1, times)


@functools.lru_cache(maxsize=2**16)
def times(length: int, slots: int) -> int:
    """The least r with C(slots + r - 1, r) >= length: how often a step is taken at most."""
    if length <= slots:
        return 1
    if slots == LEAST:
        return length - 1
    r = 2
    while reach(slots, r) < length:
        r += 1
    return r


def cut(length: int, slots: int) -> int:
    """Where a state is kept if ``length`` > ``slots``: both parts then need what their binomial numbers allow."""
    r = times(length, slots)
    return max(1, length - reach(slots - 1, r), min(reach(slots, r - 1), length - reach(slots - 1, r - 1)))


@functools.lru_cache(maxsize=2**16)
def taken(length: int, slots: int) -> int:
    """Steps taken to revisit ``length`` of them with ``slots`` states: at most 2.5 % more than the least possible."""
    total = 0
    while length > slots:
        if slots == LEAST:
            return total + length * (length + 1) // 2 - 1
        first = cut(length, slots)
        total += first + taken(first, slots)
        length, slots = length - first, slots - 1
    return total + length
