"""Which states a growing run keeps on disk: evenly spaced, twice as far apart whenever they fill their budget."""

from dataclasses import dataclass, field, replace
from typing import final


@final
@dataclass(frozen=True)
class Thinning:
    """States every ``spacing`` steps, that take at most ``limit`` bytes together (None: any); ``kept``: step -> bytes.

    A state that does not fit doubles the spacing until it does, and the states between are dropped. How long the run
    will be need not be known: with room for S states at least S/2 are kept at any time. The first state stays, and so
    does the newest until the next drop, whatever the limit and the spacing. After Wang, Moin and Iaccarino (SIAM J.
    Sci. Comput. 31, 2009), on checkpoints of computations whose length is unknown.
    Example: ``Thinning(100, 10**9).with_room_for(200, size).spacing == 100`` while nothing is kept.
    """

    spacing: int
    limit: int | None = None
    kept: dict[int, int] = field(default_factory=dict)

    def due(self, step: int) -> bool:
        """Whether the state before ``step`` is to be kept."""
        return step % self.spacing == 0

    def with_room_for(self, step: int, size: int) -> "Thinning":
        """Thinned until another ``size`` bytes fit, or only the first state and that of ``step`` are left."""
        spacing, kept = self.spacing, self.kept
        while self.limit is not None and len(kept) > 1 and sum(kept.values()) + size > self.limit:
            spacing *= 2
            kept = {held: bytes_ for held, bytes_ in kept.items() if not held % spacing}
        return replace(self, spacing=spacing, kept=kept)

    def holding(self, step: int, size: int) -> "Thinning":
        """With the state before ``step`` kept too."""
        return replace(self, kept={**self.kept, step: size})

    def going_on(self, kept: dict[int, int]) -> "Thinning":
        """Of a recording that is gone on with: its states, and as far apart as they had come to be."""
        spacing = self.spacing
        while any(step not in kept for step in range(spacing, max(kept) + 1, spacing)):
            spacing *= 2
        return replace(self, spacing=spacing, kept=kept)
