"""How a sweep is fitted into its budgets: queries carried together, states kept in memory and on disk."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

from hydragrad.errors import UnsupportedError, message
from hydragrad.hypergradient.choosing import Chosen
from hydragrad.hypergradient.rehearsing import Costs
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.trajectory.schedule import LEAST, Schedule


@final
@dataclass(frozen=True)
class Arrangement:
    """``carried`` queries a sweep, ``slots`` states in memory, ``on_disk`` further states of a stretch on disk."""

    carried: int
    slots: int
    on_disk: int = 0

    @property
    def schedule(self) -> Schedule:
        return Schedule(self.slots, self.on_disk)

    def sweeps(self, queries: int) -> int:
        return -(-queries // self.carried)

    def narrowed(self, queries: int, most: int) -> "Arrangement":
        """With at most ``most`` queries a sweep, in sweeps of about the same width."""
        return replace(self, carried=_balanced(queries, min(self.carried, most)))


@final
@dataclass(frozen=True)
class Needs:
    """Bytes and seconds of every part of a sweep over ``steps`` steps in ``stretches`` (length -> how many).

    Bytes: ``fixed``: whatever is chosen; ``block`` queries a product need ``work``, a single one ``each``; a query's
    ``adjoint``; ``column``: of one query in the result; a ``slot`` in memory; a state ``stored`` on disk.
    """

    steps: int
    stretches: tuple[tuple[int, int], ...]
    queries: int
    block: int
    costs: Costs
    fixed: int
    each: int
    adjoint: int
    column: int
    slot: int
    stored: int
    reweighted: int = 0

    @staticmethod
    def of(sweep: Sweep, chosen: Chosen, costs: Costs, queries: int, rows: int, reweighted: int = 0) -> "Needs":
        sizes = chosen.sizes
        marks = [t for t in sweep.run.trajectory.checkpoints if t < sweep.stop]
        lengths = Counter(b - a for a, b in itertools.pairwise([*marks, sweep.stop]))
        return Needs(
            steps=sweep.stop,
            stretches=tuple(sorted(lengths.items())),
            queries=queries,
            block=chosen.block,
            costs=costs,
            fixed=sizes.made + chosen.held,
            each=costs.alone,
            adjoint=sizes.adjoint,
            column=rows * sizes.number,
            slot=sizes.state,
            stored=sizes.stored,
            reweighted=reweighted,
        )

    @property
    def longest(self) -> int:
        """States in memory beyond which more spare nothing."""
        return math.isqrt(self.steps - 1) + 1 if self.reweighted else max(length for length, _ in self.stretches)

    @property
    def per_slot(self) -> int:
        """Bytes of a state in memory; a reweighted run keeps as many again on the way (see Reweighted)."""
        return self.slot + (self.stored if self.reweighted else 0)

    def stretches_of(self, arranged: Arrangement) -> tuple[tuple[int, int], ...]:
        """Stretches between states that are there when a sweep begins."""
        if not self.reweighted:
            return self.stretches
        every = max(arranged.slots, -(-self.steps // arranged.slots))
        whole, rest = divmod(self.steps, every)
        return ((every, whole), (rest, 1)) if rest else ((every, whole),)

    @property
    def least(self) -> int:
        """States that a stretch needs in memory."""
        return min(LEAST, self.longest)

    def replayed(self, arranged: Arrangement) -> int:
        """Steps that one sweep takes."""
        return sum(count * arranged.schedule.replayed(length) for length, count in self.stretches_of(arranged))

    def replays(self, arranged: Arrangement) -> float:
        """Of the run, in all sweeps; a reweighted run is made by one more."""
        one = arranged.sweeps(self.queries) * self.replayed(arranged) / self.steps
        return self.reweighted * (one + 1) if self.reweighted else one

    def times(self, arranged: Arrangement) -> int:
        """How often a sweep takes one step at most."""
        return max(arranged.schedule.times(length) for length, _ in self.stretches_of(arranged))

    def replay_seconds(self, arranged: Arrangement) -> float:
        """Of one sweep: steps taken, states kept, read from checkpoints, written and read again."""
        costs = self.costs
        written = sum(count * arranged.schedule.written(length) for length, count in self.stretches)
        loads = 0 if self.reweighted else sum(count for _, count in self.stretches) + 1 + 2 * written
        return self.replayed(arranged) * costs.advance + self.steps * costs.capture + loads * costs.load

    def seconds(self, arranged: Arrangement) -> float:
        """Of all sweeps."""
        one = self.replay_seconds(arranged) + self.steps * self.costs.step
        all_ = arranged.sweeps(self.queries) * one + self.steps * self.queries * self.costs.query
        return self.reweighted * (all_ + self.steps * self.costs.advance) if self.reweighted else all_

    def bytes(self, arranged: Arrangement) -> int:
        """At most at a time, the result included."""
        return self.without_states(arranged.carried) + arranged.slots * self.per_slot

    def without_states(self, carried: int) -> int:
        """Result and what is made once; a block's work; adjoints, and their columns unless they are the result."""
        work = self.costs.work
        if carried < self.block:  # a line between what one query needs and what a block does
            work = self.each + (carried - 1) * max(work - self.each, 0) // (self.block - 1)
        columns = 0 if carried == self.queries and self.reweighted < 2 else carried * self.column
        return self.fixed + self.queries * self.column + work + carried * self.adjoint + columns


def arrange(needs: Needs, memory: int, disk: int, replays: float | None) -> Arrangement:
    """The arrangement within ``memory`` and ``disk`` bytes and ``replays`` of the run that takes fewest seconds.

    Where nothing fits into ``memory``, the smallest there is. Raises UnsupportedError where nothing does in so many
    ``replays``.
    """
    best: Arrangement | None = None
    fewest = math.inf
    for arranged in _fitting(needs, memory, disk):
        total = needs.replays(arranged)
        fewest = min(fewest, total)
        if replays is not None and total > replays:
            continue
        if best is None or needs.seconds(arranged) < needs.seconds(best):
            best = arranged
    if best is None and fewest < math.inf:
        raise UnsupportedError(_too_few(needs, memory, fewest, replays))
    return best or Arrangement(1, needs.least)


def _fitting(needs: Needs, memory: int, disk: int) -> Iterator[Arrangement]:
    """What fits, with fewer and fewer queries a sweep, until more sweeps cannot pay."""
    found = math.inf
    for carried in _widths(needs.queries):
        sweeps = -(-needs.queries // carried)
        if sweeps * needs.steps * needs.costs.advance > found:
            return
        room = (memory - needs.without_states(carried)) // needs.per_slot
        if room < needs.least:
            continue
        slots = min(room, needs.longest)
        for on_disk in _on_disk(needs, slots, disk // max(needs.stored, 1)):
            arranged = Arrangement(carried, slots, on_disk)
            found = min(found, needs.seconds(arranged) - needs.steps * needs.queries * needs.costs.query)
            yield arranged


def _widths(queries: int) -> Iterator[int]:
    """Queries a sweep that cut them into parts of about the same width, widest first."""
    sweeps, last = 1, 0
    while sweeps <= queries:
        carried = -(-queries // sweeps)
        if carried != last:
            yield carried
        last, sweeps = carried, max(sweeps + 1, math.ceil(sweeps * 1.05))
    if last != 1:
        yield 1


def _on_disk(needs: Needs, slots: int, most: int) -> list[int]:
    """Numbers of states on disk worth comparing: none, powers of two, as many as there is room for or use."""
    useful = min(most, -(-needs.longest // slots) - 2)
    if slots >= needs.longest or useful < 1:
        return [0]
    return [0, *(2**k for k in range(useful.bit_length()) if 2**k < useful), useful]


def _too_few(needs: Needs, memory: int, fewest: float, replays: float | None) -> str:
    whole = Arrangement(needs.queries, needs.longest)
    return message(
        "the run cannot be swept with so few replays in this memory",
        expected=f"replays={fewest:.2f} or more within {memory} bytes, or memory={needs.bytes(whole)} for one replay",
        got=f"replays={replays}",
        remedy="allow more memory, disk or replays, or ask fewer queries",
    )


def _balanced(queries: int, most: int) -> int:
    return -(-queries // -(-queries // most))
