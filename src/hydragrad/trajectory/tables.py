"""Tables of a segment of steps: distinct rows stored once, random states only where they do not follow from others."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor

from hydragrad.files import dumps
from hydragrad.trajectory.randomness import GENERATORS, Draw
from hydragrad.trajectory.state import Pass
from hydragrad.trajectory.watching import Autocast

_NOTHING, _CONTINUES = -2, -1
_NEVER = object()


@final
class Table:
    """Distinct rows in order of appearance."""

    def __init__(self) -> None:
        self._places: dict[str, int] = {}  # of a row's JSON
        self._last: tuple[Any, int] = (_NEVER, -1)

    def place(self, row: Any, plain: Callable[[Any], Any] = lambda row: row) -> int:
        """The row's place; ``plain`` makes it JSON. The very object of the call before is known at once."""
        if row is self._last[0]:
            return self._last[1]
        self._last = (row, self._placed(plain(row)))
        return self._last[1]

    def _placed(self, row: Any) -> int:
        return self._places.setdefault(dumps(row), len(self._places))

    def json(self) -> str:
        """All rows."""
        return f"[{','.join(self._places)}]"


def encode_digests(digests: Sequence[Tensor | None], name: str) -> dict[str, Tensor]:
    """Digests of batches one after the other, and of which batches they are."""
    noted = [part.to("cpu") for part in digests if part is not None]
    return {
        name: torch.cat([torch.zeros(0, dtype=torch.int64), *noted]),
        f"{name}_of": torch.tensor([part is not None for part in digests], dtype=torch.int64),
    }


def decode_digests(tensors: dict[str, Tensor], name: str, lengths: Sequence[int]) -> list[Tensor | None]:
    """Inverse of ``encode_digests`` for batches of these lengths."""
    noted = tensors[f"{name}_of"].tolist()
    parts = tensors[name].split([length if one else 0 for length, one in zip(lengths, noted, strict=True)])
    return [part if one else None for part, one in zip(parts, noted, strict=True)]


def encode_draws(draws: Sequence[Draw | None]) -> dict[str, Tensor]:
    """``draws`` int64 [micro-batches, generators]: nothing drawn, going on, or a row of ``random_<generator>``."""
    states: dict[str, list[Tensor]] = {name: [] for name in GENERATORS}
    places = []
    for draw in draws:
        row = [_NOTHING] * len(GENERATORS)
        for name, state in (draw or {}).items():
            row[GENERATORS.index(name)] = _CONTINUES if state is None else len(states[name])
            if state is not None:
                states[name].append(state)
        places.append(row)
    tensors = {f"random_{name}": torch.stack(rows) for name, rows in states.items() if rows}
    return {"draws": torch.tensor(places, dtype=torch.int64).reshape(-1, len(GENERATORS)), **tensors}


def decode_draws(tensors: dict[str, Tensor]) -> list[Draw | None]:
    """Inverse of ``encode_draws``."""
    if min([0, *tensors["draws"].flatten().tolist()]) < _NOTHING:
        raise ValueError("a negative place in a table")
    draws: list[Draw | None] = []
    for places in tensors["draws"].tolist():
        drawn = {
            name: None if place == _CONTINUES else tensors[f"random_{name}"][place]
            for name, place in zip(GENERATORS, places, strict=True)
            if place != _NOTHING
        }
        draws.append(drawn or None)
    return draws


def plain_autocast(cast: Autocast | None) -> Any:
    """For a table."""
    return None if cast is None else [cast.device_type, cast.dtype, cast.cache, cast.backward]


def encode_passes(passes: Sequence[Pass], modes: Table, autocast: Table) -> dict[str, Tensor]:
    """Skipped batches that changed buffers; nothing where there are none. Their draws are stored with the others."""
    if not passes:
        return {}
    rows = [
        (len(p.ids), p.epoch, p.place, modes.place(p.modes, dict), autocast.place(p.autocast, plain_autocast))
        for p in passes
    ]
    return {
        "passes": torch.tensor(rows, dtype=torch.int64),
        "passes_ids": torch.cat([p.ids for p in passes]),
        **encode_digests([p.digests for p in passes], "passes_digests"),
    }


def decode_passes(
    tensors: dict[str, Tensor], modes: Sequence[Any], casts: Sequence[Autocast | None], draws: Sequence[Draw | None]
) -> list[Pass]:
    """Inverse of ``encode_passes``."""
    if "passes" not in tensors:
        return []
    rows = tensors["passes"].tolist()
    if min(min(row) for row in rows) < 0:
        raise ValueError("a negative count or place in a table")
    lengths = [row[0] for row in rows]
    ids, digests = tensors["passes_ids"].split(lengths), decode_digests(tensors, "passes_digests", lengths)
    return [
        Pass(ids[k], digests[k], epoch, place, modes[mode], casts[cast], draws[k])
        for k, (_, epoch, place, mode, cast) in enumerate(rows)
    ]
