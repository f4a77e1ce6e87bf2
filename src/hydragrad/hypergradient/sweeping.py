"""What every sweep over a recorded run needs, gathered once: objective, optimizer, checks that it can be swept."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import final

import torch
from torch import Tensor, nn

from hydragrad.copying import copy_of
from hydragrad.errors import UnsupportedError, message
from hydragrad.hypergradient.changing import changed_buffers, go_to
from hydragrad.hypergradient.consistency import HALF_PRECISION
from hydragrad.hypergradient.formulas import check_update
from hydragrad.run import Run
from hydragrad.step.known import ships, update_of
from hydragrad.step.objective import Objective
from hydragrad.step.optimizer_map import OptimizerMap
from hydragrad.step.plain_forms import hooked
from hydragrad.trajectory.ending import refuse_moved_on
from hydragrad.trajectory.finite import check_finite
from hydragrad.trajectory.replay import Replayer
from hydragrad.trajectory.reweighted import Reweighted
from hydragrad.trajectory.state import State
from hydragrad.trajectory.store import Trajectory

_PRECISE = (torch.float32, torch.float64)


@final
@dataclass(frozen=True)
class Sweep:
    """A run made ready for sweeps that end at step ``stop``."""

    run: Run
    stop: int
    replayer: Replayer
    objective: Objective
    optimizer: OptimizerMap
    tokens: bool = False
    """Whether the terms of tokens are to be told apart, which not every engine does."""
    drift_tolerance: float | None = None
    """How far the gradient that is differentiated may be from the step's, relatively; None: by what it was taken in."""

    @staticmethod
    def of(run: Run, step: int | None = None, *, tokens: bool = False, drift_tolerance: float | None = None) -> "Sweep":
        """Raises UnsupportedError for what cannot be differentiated (yet), naming it."""
        if step is None:
            refuse_moved_on(run.trajectory)
        stop = run.num_steps if step is None else step
        manifest = run.trajectory.manifest
        if not 1 <= stop <= run.num_steps:
            raise UnsupportedError(
                message(
                    "no such step to ask about",
                    expected=f"step=1 to {run.num_steps} (the number of steps recorded)",
                    got=f"step={stop}",
                )
            )
        update, groups = update_of(manifest.optimizer), manifest.optimizer["groups"]
        grouped = {name for names in groups for name in names}
        idle = frozenset.intersection(*(record.without_grad for record in run.steps[:stop]))
        trained = [name for name in manifest.params if name in grouped and name not in idle]
        replayer = run.replayer(check=True)
        carried, counters = changed_buffers(run, replayer, stop)
        replayer.constants = frozenset(manifest.buffers) - {*carried, *counters}
        key = ("objective", tuple(trained), carried, counters)
        if key not in run.memo:
            run.memo[key] = Objective(run.problem, copy_of(run.problem.model), trained, carried, counters)
        objective: Objective = run.memo[key]
        objective.follow_modes(manifest.modes)
        sweep = Sweep(
            run,
            stop,
            replayer,
            objective,
            OptimizerMap(update, trained, groups),
            tokens,
            drift_tolerance,
        )
        sweep._refuse()
        if not ships(manifest.optimizer):
            check_update(run, update)
        if drift_tolerance is not None and not drift_tolerance > 0:
            raise UnsupportedError(message("bad drift_tolerance", expected="a number above 0", got=drift_tolerance))
        return sweep

    @property
    def gap_limit(self) -> float | None:
        """What ``gradient_gap`` allows: as asked for; else for autocast's rounding, or (None) for that of the dtype."""
        usual = None if self.run.half_precision is None else HALF_PRECISION
        return usual if self.drift_tolerance is None else self.drift_tolerance

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the trained parameters (of the first, if they differ)."""
        return getattr(torch, self.run.trajectory.manifest.params[self.objective.names[0]]["dtype"])

    @property
    def elementwise(self) -> bool:
        """Whether every map between two steps, curvature apart, is elementwise: no buffers, no clipping by norm."""
        clips = (clip for record in self.run.steps[: self.stop] for clip in record.clips)
        return not self.objective.carried and not any(clip.kind == "norm" for clip in clips)

    @cached_property
    def slots(self) -> list[tuple[str, ...]]:
        """Names of the optimizer's slots of each trained parameter, over all steps of the sweep."""
        distinct = {id(record.groups): record.groups for record in self.run.steps[: self.stop]}
        return self.optimizer.slots(distinct.values())

    def end(self) -> State:
        """The state that is asked about, step ``stop``, on the device; refused unless its parameters are finite."""
        state = go_to(self.run.trajectory, self.replayer, self.stop)
        check_finite(state, self.replayer, self.run.trajectory)
        return state

    def way(self, weights: Tensor | None, most: int, watch: Callable[[], object]) -> "Way":
        """What a sweep goes back along, and where it ends: the recorded run, or the run with ``weights`` [N]."""
        if weights is None:
            return Way(self.run.trajectory, self.end())
        reweighted = Reweighted(self.replayer, self.run.trajectory, weights, self.stop, most, watch)
        return Way(reweighted, reweighted.state(self.stop))

    def _refuse(self) -> None:
        manifest = self.run.trajectory.manifest
        if not self.objective.names:
            raise UnsupportedError(message("no parameter was trained", expected="at least one gradient in the run"))
        for name in self.objective.names:
            dtype = getattr(torch, manifest.params[name]["dtype"])
            if dtype not in _PRECISE:
                raise UnsupportedError(
                    message(
                        f"parameter {name!r} is {dtype}",
                        expected="float32 or float64 parameters",
                        got=str(dtype),
                        cause="half precision rounds the derivatives of a whole run away",
                        remedy="train in float32",
                    )
                )
        self._refuse_clipped_beside()
        self._refuse_passed_by()
        for name, part in self.objective.module.named_modules():
            trains = any(record.modes.get(name, manifest.modes.get(name)) for record in self.run.steps[: self.stop])
            if isinstance(part, nn.SyncBatchNorm) and trains:
                raise UnsupportedError(
                    message(
                        f"module {name!r} is a SyncBatchNorm",
                        expected="normalization within one process",
                        cause="a model converted for distributed training",
                        remedy="train with BatchNorm, or freeze the statistics with .eval() on those layers",
                    )
                )
            if trains and (type(part).__name__ == "_SpectralNorm" or hooked(part, "SpectralNorm")):
                raise UnsupportedError(
                    message(
                        f"module {name!r} is a spectral norm that trains",
                        expected="layers whose gradient takes nothing that depends on the parameters for a constant",
                        cause="its power iteration follows the weights, and its gradient takes the result for a "
                        "constant: derivatives of that gradient would miss how it follows",
                        remedy="train with weight_norm or without, or hold that module still by .eval()",
                    )
                )

    def _refuse_passed_by(self) -> None:
        """A skipped batch that moved statistics which carry derivatives is swept in the modes of its step only."""
        steps = self.run.steps[: self.stop]
        passed = next((r.index for r in steps for one in r.passes if dict(one.modes) != dict(r.modes)), None)
        if passed is not None and self.objective.carried:
            raise UnsupportedError(
                message(
                    f"before step {passed} a batch that was skipped changed the buffer {self.objective.carried[0]!r}",
                    expected="skipped batches that ran in the step's own modes of training and evaluation",
                    cause="a batch that was only looked at, with some layers of the model frozen or thawed for it",
                    remedy="put the whole model into .eval() for batches that are only looked at",
                )
            )

    def _refuse_clipped_beside(self) -> None:
        """A gradient that the optimizer does not use, yet a clip's norm counts, would need derivatives of its own."""
        known = set(self.objective.names)
        for record in self.run.steps[: self.stop]:
            for clip in record.clips:
                beside = [n for n in clip.names if n not in known and n not in record.without_grad]
                if clip.kind == "norm" and beside:
                    raise UnsupportedError(
                        message(
                            f"step {record.index} clipped the gradient of {beside[0]!r}, which is not trained",
                            expected="clipping by norm over parameters of the optimizer",
                            cause="model.parameters() with parameters that the optimizer was not given",
                            remedy="give clip_grad_norm_ the optimizer's parameters, or set requires_grad_(False)",
                        )
                    )


@final
@dataclass(frozen=True)
class Way:
    """What a sweep goes back along, and the state it starts from."""

    trajectory: Trajectory | Reweighted
    end: State
