"""One optimizer step over all parameters: the linearization of each at one recorded moment."""

from collections.abc import Iterable, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from hydragrad.step.updates import Hyper, Linearization, Slots, Update


@final
class OptimizerMap:
    """The update of every trained parameter, each with its param group's hyperparameters.

    ``names``: the trained parameters; ``groups``: names by param group, as recorded.
    """

    def __init__(self, update: Update, names: Sequence[str], groups: Sequence[Sequence[str]]) -> None:
        self.update = update
        self.names = tuple(names)
        self._kept: dict[int, tuple[Hyper, tuple[tuple[str, float], ...], Linearization]] = {}
        self.group_of = {name: g for g, members in enumerate(groups) for name in members}

    def slots(self, steps: Iterable[Sequence[Hyper]]) -> list[tuple[str, ...]]:
        """Slot names of each parameter: all that any of ``steps`` has, each given by its groups' hyperparameters.

        A loop may switch momentum off and on again; what its buffer holds meanwhile comes back.
        """
        found: dict[int, dict[str, None]] = {group: {} for group in self.group_of.values()}
        for hypers in steps:
            for group, names in found.items():
                names.update(dict.fromkeys(self.update.slots(hypers[group])))
        return [tuple(found[self.group_of[name]]) for name in self.names]

    def linearize(
        self,
        params: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Tensor]],
        gradient: Mapping[str, Tensor],
        hypers: Sequence[Hyper],
    ) -> list[Linearization | None]:
        """Derivative of the step of each parameter; None for one without a gradient, which the step leaves alone."""
        found: dict[str, Linearization] = {}
        for (group, scalars, _), names in self._alike(params, states, gradient).items():
            hyper = hypers[group]
            if self.update.linear:
                found.update(dict.fromkeys(names, self._shared(group, hyper, scalars)))
            else:
                found.update(self._together(names, params, states, gradient, hyper, dict(scalars)))
        return [found.get(name) for name in self.names]

    def _shared(self, group: int, hyper: Hyper, scalars: tuple[tuple[str, float], ...]) -> Linearization:
        """A linear update's coefficients, kept until the group's hyperparameters or the counters change."""
        kept = self._kept.get(group)
        if kept is None or kept[0] is not hyper or kept[1] != scalars:
            nothing = torch.empty(0)
            kept = self._kept[group] = (
                hyper,
                scalars,
                self.update.linearize(nothing, {}, nothing, hyper, dict(scalars)),
            )
        return kept[2]

    def _alike(
        self,
        params: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Tensor]],
        gradient: Mapping[str, Tensor],
    ) -> dict[tuple, list[str]]:
        """Parameters that share hyperparameters and counters: elementwise, they are one long vector."""
        alike: dict[tuple, list[str]] = {}
        for name in self.names:
            if name in gradient:
                scalars = tuple(self.update.scalars(states.get(name, {})).items())
                alike.setdefault((self.group_of[name], scalars, params[name].dtype), []).append(name)
        return alike

    def _together(
        self,
        names: list[str],
        params: Mapping[str, Tensor],
        states: Mapping[str, Mapping[str, Tensor]],
        gradient: Mapping[str, Tensor],
        hyper: Hyper,
        scalars: Mapping[str, float],
    ) -> dict[str, Linearization]:
        def flat(tensors: list[Tensor]) -> Tensor:
            return torch.cat([x.reshape(-1) for x in tensors])

        slots: list[Slots] = [self.update.read(params[name], states.get(name, {}), hyper) for name in names]
        joint = self.update.linearize(
            flat([params[name] for name in names]),
            {slot: flat([held[slot] for held in slots]) for slot in self.update.slots(hyper)},
            flat([gradient[name] for name in names]),
            hyper,
            scalars,
        )
        shapes = [params[name].shape for name in names]
        parts = {
            pair: [piece.view(shape) for piece, shape in zip(c.split([s.numel() for s in shapes]), shapes, strict=True)]
            for pair, c in joint.coefficients.items()
            if isinstance(c, Tensor)
        }
        return {
            name: Linearization(joint.slots, {pair: pieces[k] for pair, pieces in parts.items()})
            for k, name in enumerate(names)
        }
