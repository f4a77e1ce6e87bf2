"""The loaders of one recording: which there are, how many passes each has begun, how far each stands in one."""

from collections.abc import Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, final

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.trajectory.loaders import Ids, WatchedBatches, WatchedLoader, id_tensor
from hydragrad.trajectory.points import LoaderPoint, Point
from hydragrad.trajectory.randomness import RandomState

Watched = WatchedLoader | WatchedBatches


@final
@dataclass
class _Progress:
    """One loader's passes; see LoaderPoint. ``ahead``: batches of the open pass to be passed by when it goes on."""

    passes: int = 0
    taken: int | None = None
    begun: RandomState | None = None
    own: tuple[Tensor, ...] = ()
    ahead: int | None = None


@final
class Sources:
    """Numbers loaders in the order in which they begin. ``resumable``: random states are kept when a pass begins.

    A loader not seen before takes the number of another that has no pass open, and goes on with its passes: it was made
    anew for the next epoch. Only loaders whose passes overlap (zip) have numbers of their own.
    """

    def __init__(self, device: torch.device, *, resumable: bool = False) -> None:
        self._device, self._resumable = device, resumable
        self.first: Watched | None = None
        """The first loader that was given."""
        self._data: Any = None
        self._loaders: list[Watched] = []  # by number, the last that had it
        self._progress: list[_Progress] = []
        self._open: list[int] = []  # places with an open pass, the outermost first
        self._waiting: tuple[LoaderPoint, ...] = ()  # see go_on
        self._last: Mapping[int, Tensor] = {}
        self._restored = False
        self._later: RandomState | None = None  # of the generators once what was trained on has been passed by

    @property
    def passing_now(self) -> bool:
        """Whether a pass over some loader is open."""
        return bool(self._open)

    def passing(self, place: int, watched: Watched) -> Generator[tuple[int, Ids, Any], None, None]:
        """One pass over a watched loader: its number, ids and batches."""
        progress = self._progress[place]
        batches = self._begin(place, watched, progress)
        if place in self._open:  # an iterator that was left lying
            self._open.remove(place)
        self._open.append(place)
        epoch = progress.passes - 1
        try:
            for ids, batch in batches:
                assert progress.taken is not None
                progress.taken += 1
                yield epoch, ids, batch
        finally:
            progress.taken = None
            if place in self._open:
                self._open.remove(place)

    def between(self, place: int | None) -> bool:
        """Whether a loop that asks this loader (None: a new pass) is between two rounds of its outermost pass."""
        return self._open[0] == place if self._open else place is None

    def points(self) -> tuple[LoaderPoint, ...]:
        """Where every loader stands."""
        return tuple(
            LoaderPoint(one.passes, one.taken, one.begun, one.own if one.taken is not None else _own(watched))
            for one, watched in zip(self._progress, self._loaders, strict=True)
        )

    def go_on(self, point: Point, last: Mapping[int, Tensor], *, restored: bool) -> None:
        """Count passes on from a point; ``restored``: pass the batches of open passes by, as they were drawn.

        ``last``: place of a loader -> ids of the batch that it gave last.
        """
        self._waiting, self._last = point.loaders, last
        self._restored, self._later = restored, point.random
        for place, progress in enumerate(self._progress):
            self._take_up(place, progress)

    def _take_up(self, place: int, progress: _Progress) -> None:
        if place >= len(self._waiting):
            return
        point = self._waiting[place]
        progress.passes = point.passes
        if point.taken is None:
            if self._restored:
                _set_own(self._loaders[place], point.own)
        elif self._restored:
            progress.ahead, progress.begun, progress.own = point.taken, point.begun, point.own
        elif point.taken < _length(self._loaders[place]):
            progress.passes -= 1  # the loop passes by itself what it had trained on: the same pass

    def _begin(self, place: int, watched: Watched, progress: _Progress) -> Iterator[tuple[Ids, Any]]:
        ahead, progress.ahead = progress.ahead, None
        if ahead is not None:
            return self._begin_again(place, watched, progress, ahead)
        progress.passes += 1
        progress.taken = 0
        if self._resumable:
            progress.begun, progress.own = RandomState.capture(self._device), _own(watched)
        watched.begin(progress.passes - 1)
        return iter(watched)

    def _begin_again(self, place: int, watched: Watched, progress: _Progress, ahead: int) -> Iterator[tuple[Ids, Any]]:
        """The open pass from its beginning, its first ``ahead`` batches passed by; then the generators as they were."""
        assert progress.begun is not None
        assert self._later is not None
        RandomState.of(progress.begun.tensors(), self._device).set()
        _set_own(watched, progress.own)
        watched.begin(progress.passes - 1)
        batches = iter(watched)
        passed = [id_tensor(ids) for ids, _ in islice(batches, ahead)]
        last = self._last.get(place)
        if len(passed) < ahead or (last is not None and not any(torch.equal(ids, last) for ids in passed)):
            raise MismatchError(
                message(
                    "the loader does not give the batches again that were trained on in this pass",
                    expected=f"{ahead} batches, among them the examples {[] if last is None else last.tolist()[:8]}",
                    got=f"{len(passed)} batches, the last with {passed[-1].tolist()[:8] if passed else []}",
                    cause="another loader, or a sampler that draws from neither the global generators nor its own",
                    remedy="make the loader as in the run that is gone on with, its sampler's randomness from torch",
                )
            )
        RandomState.of(self._later.tensors(), self._device).set()
        progress.taken = ahead
        return batches

    def watch(self, loader: Iterable[Any], indices: Iterable[Any] | None) -> Watched:
        """The watched form of a loader; refused if its batches have no ids."""
        if indices is not None:
            watched = WatchedBatches(loader, indices)
        elif isinstance(loader, DataLoader):
            known = [one for one in self._loaders if isinstance(one, WatchedLoader) and one.loader is loader]
            watched = known[0] if known else WatchedLoader(loader)
            self._refuse_other_data(watched)
        else:
            raise UnsupportedError(
                message(
                    "the ids of these batches are unknown",
                    expected="a torch DataLoader",
                    got=type(loader).__name__,
                    remedy="recording.batches(iterable, indices=[[ids of batch 0], [ids of batch 1], ...])",
                )
            )
        self.first = watched if self.first is None else self.first
        return watched

    def _refuse_other_data(self, watched: WatchedLoader) -> None:
        self._data = watched.data if self._data is None else self._data
        if self._data is not watched.data:
            raise UnsupportedError(
                message(
                    "loaders of different data sets in one recording",
                    expected="one data set, so that an id means one example",
                    got=f"{type(self._data).__name__} of {len(self._data)}, {type(watched.data).__name__} "
                    f"of {watched.length}",
                    remedy="let both loaders sample from one data set (ConcatDataset and samplers)",
                )
            )

    def place(self, watched: Watched) -> int:
        """The number of a loader of which a pass begins; batches with ids given by hand all have one, for epochs."""
        by_hand = isinstance(watched, WatchedBatches)
        alike = [k for k, known in enumerate(self._loaders) if isinstance(known, WatchedBatches) == by_hand]
        own = [k for k in alike if by_hand or self._loaders[k] is watched]
        free = sorted((k for k in alike if k not in self._open), key=lambda k: self._loaders[k].kind != watched.kind)
        if found := [*own, *free]:
            self._loaders[found[0]] = watched
            return found[0]
        self._loaders.append(watched)
        self._progress.append(_Progress())
        self._take_up(len(self._loaders) - 1, self._progress[-1])
        return len(self._loaders) - 1


def _length(watched: Watched) -> int:
    try:
        return len(watched)
    except TypeError:
        return 2**62  # unknown: the pass is taken to be unfinished


def _generators(watched: Watched) -> list[torch.Generator]:
    """The loader's own, of its samplers too, each once."""
    if isinstance(watched, WatchedBatches):
        return []
    loader = watched.loader
    holders = [loader, loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders]
    return list({id(one): one for one in found if isinstance(one, torch.Generator)}.values())


def _own(watched: Watched) -> tuple[Tensor, ...]:
    return tuple(generator.get_state() for generator in _generators(watched))


def _set_own(watched: Watched, states: tuple[Tensor, ...]) -> None:
    generators = _generators(watched)
    if len(generators) != len(states):
        raise MismatchError(
            message(
                "the loader has other generators of its own than when its pass began",
                expected=f"{len(states)} generators",
                got=f"{len(generators)}",
                remedy="make the loader as in the run that is gone on with",
            )
        )
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state.clone())
