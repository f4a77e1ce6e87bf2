"""Tables of a segment of steps: distinct rows stored once, random states only where they do not follow from others."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor

from hydragrad.files import dumps
from hydragrad.trajectory.randomness import GENERATORS, Draw

_NOTHING, _CONTINUES = -2, -1


@final
class Table:
    """Distinct rows in order of appearance."""

    def __init__(self) -> None:
        self.rows: list[Any] = []
        self._places: dict[str, int] = {}

    def place(self, row: Any) -> int:
        key = dumps(row)
        if key not in self._places:
            self._places[key] = len(self.rows)
            self.rows.append(row)
        return self._places[key]


def encode_draws(draws: Sequence[Draw | None]) -> dict[str, Tensor]:
    """``draws`` int64 [micro-batches, generators]: nothing drawn, going on, or a row of ``random_<generator>``."""
    states: dict[str, list[Tensor]] = {name: [] for name in GENERATORS}
    places = torch.full((len(draws), len(GENERATORS)), _NOTHING, dtype=torch.int64)
    for k, draw in enumerate(draws):
        for g, name in enumerate(GENERATORS):
            if draw is None or name not in draw:
                continue
            state = draw[name]
            places[k, g] = _CONTINUES if state is None else len(states[name])
            if state is not None:
                states[name].append(state)
    tensors = {f"random_{name}": torch.stack(rows) for name, rows in states.items() if rows}
    return {"draws": places, **tensors}


def decode_draws(tensors: dict[str, Tensor], micro_batches: int) -> list[Draw | None]:
    """Inverse of ``encode_draws``; all None where nothing was written."""
    if "draws" not in tensors:
        return [None] * micro_batches
    draws: list[Draw | None] = []
    for places in tensors["draws"].tolist():
        drawn = {
            name: None if place == _CONTINUES else tensors[f"random_{name}"][place]
            for name, place in zip(GENERATORS, places, strict=True)
            if place != _NOTHING
        }
        draws.append(drawn or None)
    return draws
