"""Re-running recorded steps exactly, with weights on the examples if asked."""

from collections.abc import Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from hydragrad.copying import copy_of
from hydragrad.errors import MismatchError, NonFiniteError, UnsupportedError, message
from hydragrad.problem import Problem
from hydragrad.trajectory.agreement import contents, gradient_difference, tolerance
from hydragrad.trajectory.batches import BatchSource, to_device
from hydragrad.trajectory.binding import lay_out
from hydragrad.trajectory.digests import batch_digests
from hydragrad.trajectory.explaining import explain_data, explain_drift, explain_gradient, explain_left
from hydragrad.trajectory.fingerprints import GradientFingerprint
from hydragrad.trajectory.hyper import as_held
from hydragrad.trajectory.optimizers import build_optimizer, restore_optimizer, rewrites_gradients
from hydragrad.trajectory.outlived import outlived
from hydragrad.trajectory.randomness import DrawReader, RandomState
from hydragrad.trajectory.sparing import suspects
from hydragrad.trajectory.state import Hyper, State, StepRecord, capture_state, live_buffers
from hydragrad.trajectory.store import Trajectory
from hydragrad.trajectory.surroundings import differing
from hydragrad.trajectory.watching import autocast_as
from hydragrad.trajectory.writes import Writes, refuse_written


def check_weights(weights: Tensor, length: int) -> Tensor:
    """The weights [N] of the examples, refused unless of that shape and finite."""
    if not isinstance(weights, Tensor) or weights.shape != (length,):
        raise MismatchError(
            message(
                "weights do not fit the data",
                expected=f"a tensor of shape [{length}]: one weight per training example, 1 = as trained, 0 = removed",
                got=f"shape {list(weights.shape)}" if isinstance(weights, Tensor) else type(weights).__name__,
            )
        )
    if not bool(weights.isfinite().all()):
        raise NonFiniteError(message("weights are not finite", expected="finite numbers", got="NaN or infinity"))
    return weights.detach()


_GROWN = 1e-2
"""Rounding that came so near to the tolerance before it passed it was growing, and no single step is at fault."""


@final
class Replayer:
    """Takes recorded steps again: (w_t, s_t) -> (w_{t+1}, s_{t+1}) by the real torch.optim class on a private copy.

    On the machine that recorded, bit for bit. ``check``: compare each batch's content and each gradient with the
    record; a difference raises MismatchError in words.
    ``differences``: step -> relative difference of its gradient, for compared steps that were not equal bit for bit;
    ``random``: the state from which each micro-batch of the last step drew, then each skipped batch (``passes``), None
    where it drew nothing; ``raw``: its gradient by name as the loss gave it, kept where clipping or the update may
    write into it, else None. Random numbers are those of the recording, also with weights, and the caller's
    generators are left alone. ``constants``: names of buffers to which no step may write (UnsupportedError).
    Example: ``r = Replayer(problem, trajectory); r.restore(trajectory.state(0)); r.advance(trajectory.steps[0])``.
    """

    def __init__(self, problem: Problem, trajectory: Trajectory, *, check: bool = True) -> None:
        manifest = trajectory.manifest
        self.module: nn.Module = copy_of(problem.model)
        lay_out(dict(self.module.named_parameters()), manifest)
        self.differences: dict[int, float] = {}
        self.random: tuple[RandomState | None, ...] = ()
        self.raw: dict[str, Tensor] | None = None
        self.constants: frozenset[str] = frozenset()
        self._problem, self._trajectory, self.checks = problem, trajectory, check
        self._params = dict(self.module.named_parameters())
        self._buffers = dict(self.module.named_buffers())
        self._modules = dict(self.module.named_modules())
        self.device = next((param.device for param in self._params.values()), torch.device("cpu"))
        self.source = BatchSource(problem.data, problem.collate, self.device, manifest.collate["mode"])
        self._fingerprint = GradientFingerprint([param.numel() for param in self._params.values()])
        self._draws = DrawReader(self.device)
        self._held = {name: None for names in manifest.optimizer["groups"] for name in names}  # by the optimizer
        self._compared = set[int]()  # steps whose batches were
        self._step = 0
        self._groups: tuple[Hyper, ...] | None = None
        self._modes: Mapping[str, bool] | None = None
        self._none: frozenset[str] | None = None
        self._frozen: frozenset[str] = frozenset()
        self._trained: list[Tensor] = []
        self._rewrites = False
        self._checked_weights: Tensor | None = None
        groups = trajectory.steps[0].groups if trajectory.steps else tuple({} for _ in manifest.optimizer["groups"])
        self._optimizer = build_optimizer(manifest.optimizer, groups, self._params)
        self._follow_modes(manifest.modes)

    @property
    def step(self) -> int:
        """The next step to be taken."""
        return self._step

    @torch.no_grad()
    def restore(self, state: State) -> None:
        """Go to a state: parameters, buffers and optimizer state are copied in."""
        for name, param in self._params.items():
            param.copy_(state.params[name])
        for name, buffer in self._live_buffers().items():
            buffer.copy_(state.buffers[name])
        restore_optimizer(self._optimizer, state.optimizer, self._params)
        self._draws.ends = {} if state.random is None else state.random.tensors()
        self._step = state.step

    def state(self, *, slots: bool = True) -> State:
        """Where it stands, as detached clones; without ``slots`` it cannot be restored, see ``capture_state``."""
        random = RandomState.of(self._draws.ends, self.device)
        return capture_state(self._step, self._params, self._live_buffers(), self._optimizer, random, slots=slots)

    def _live_buffers(self) -> dict[str, Tensor]:
        return live_buffers(self.module, self._buffers) if self._buffers else {}

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last step as the loss gave them, by name (absent: none came); sparse ones as dense."""
        if self.raw is not None:
            return self.raw
        return {name: _dense(param.grad) for name, param in self._params.items() if param.grad is not None}

    def passed(self, step: StepRecord, *, compare: bool = True) -> list[tuple[Tensor, Any]]:
        """(ids, batch) of each skipped batch that changed buffers before or within a step, as ``batches``."""
        if not self._trajectory.keeps_batches:
            return [
                (one.ids, self._checked(one.ids, one.digests if compare else None, one.epoch, step.index))
                for one in step.passes
            ]
        kept = self._trajectory.batches(step.index)[len(step.batches) :] if step.passes else []
        return [(one.ids, to_device(batch, self.device)) for one, batch in zip(step.passes, kept, strict=True)]

    def batches(self, step: StepRecord, *, compare: bool = True) -> list[tuple[Tensor, Any]]:
        """(ids, batch) of each micro-batch of a step, on the device; compared with the record if asked for.

        And once in any case: examples that changed places in a batch may leave the state as it was, bit for bit.
        """
        if self._trajectory.keeps_batches:
            kept = self._trajectory.batches(step.index)
            return [(ids, to_device(batch, self.device)) for ids, batch in zip(step.batches, kept, strict=False)]
        made, compare = [], compare or step.index not in self._compared
        for k, (ids, digests) in enumerate(zip(step.batches, step.digests, strict=True)):
            epoch = step.epochs[k] if step.epochs else step.epoch
            made.append((ids, self._checked(ids, digests if compare else None, epoch, step.index)))
        self._compared.add(step.index)
        return made

    def look_at_order(self, steps: Sequence[StepRecord]) -> None:
        """Refuse a collate function that reorders, of whose batches replay asks for none: they were kept."""
        for step in steps:
            for k, ids in enumerate(step.batches):
                try:
                    self.source.fetch(ids, epoch=step.epochs[k] if step.epochs else step.epoch, fresh=True)
                except UnsupportedError:
                    raise
                except Exception:  # the data may be gone: that is what batches are kept for
                    return

    def _checked(self, ids: Tensor, digests: Tensor | None, epoch: int, step: int) -> Any:
        """The batch of these ids, compared with the record where that is asked for."""
        batch = self.source.fetch(ids, epoch=epoch)
        if digests is None or not self.checks or _same(digests, batch, ids):
            return batch
        return self._second_look(ids, digests, epoch, step)

    def advance(self, step: StepRecord, weights: Tensor | None = None, *, compare: bool = True) -> None:
        """Take one whole step; ``weights`` [N] multiply the losses of the examples (1: as trained, 0: removed).

        ``compare`` False leaves comparing to the caller, who has a recorded state to compare the end with.
        Raises MismatchError if ``step`` is not the next one, if the batch, or without weights the gradient, is not
        the recorded one; NonFiniteError for weights that are not finite.
        """
        if step.index != self._step:
            raise MismatchError(message("steps out of order", expected=f"step {self._step}", got=f"step {step.index}"))
        if weights is not None and weights is not self._checked_weights:
            check_weights(weights, len(self._problem.data))
            self._checked_weights = weights
        self._follow(step)
        before = Writes(self.module) if self.constants else None
        for param in self._params.values():
            param.grad = None
        random, passed = list[RandomState | None](), list[RandomState | None]()
        for k, (ids, batch) in enumerate(self.batches(step, compare=compare)):
            passed += self._pass_by(step, k)
            draw = step.draws[k] if step.draws else None
            cast = step.autocast[k] if step.autocast else None
            with self._draws.drawing(draw) as start, torch.enable_grad():
                with autocast_as(cast, self.device.type):
                    scalar = self._scalar(ids, batch, None if weights is None else weights[ids], first=k == 0)
                with autocast_as(cast if cast is not None and cast.backward else None, self.device.type):
                    (scalar if step.scale is None else scalar * self._number(step.scale)).backward()
            random.append(start)
        passed += self._pass_by(step, len(step.batches))
        self.random = (*random, *passed)
        if before is not None:
            refuse_written(before.since() & self.constants, step.index)
        for param in self._trained:
            if param.grad is None:  # unreached now, yet the recorded gradient was zeros and took part in the step
                param.grad = torch.zeros_like(param)
        self._unscale(step)
        self._clip(step)
        if weights is None and self.checks and compare:
            self._compare(step)
        self._optimizer.step()
        self._step += 1

    def _scalar(self, ids: Tensor, batch: Any, weights: Tensor | None, *, first: bool) -> Tensor:
        """What the loop differentiated for one micro-batch."""
        losses = self._problem.losses(self.module, batch, len(ids))
        scalar = self._problem.reduction.scalar(batch, losses, weights)
        return scalar + self._problem.penalty_of(self.module) if first and self._problem.penalty is not None else scalar

    def _pass_by(self, step: StepRecord, place: int) -> list[RandomState | None]:
        """Run the model on batches that were skipped at this place, for what their forward pass does to buffers."""
        if not any(one.place == place for one in step.passes):
            return []
        random = []
        for one, (_, batch) in zip(step.passes, self.passed(step), strict=True):
            if one.place != place:
                continue
            self._follow_modes(one.modes)
            cast = autocast_as(one.autocast, self.device.type)
            with self._draws.drawing(one.draw) as start, torch.enable_grad(), cast:
                self._problem.loss(self.module, batch)  # with gradients on, so that the kernels are those of training
            random.append(start)
        self._follow_modes(step.modes)
        return random

    def _number(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float32, device=self.device)

    def _unscale(self, step: StepRecord) -> None:
        """Divide by a gradient scaler's scale what it divides: the gradients of the optimizer's parameters."""
        if step.scale is None:
            return
        inverse = self._number(step.scale).double().reciprocal().float().item()
        for group in self._optimizer.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.grad.mul_(inverse)

    def _clip(self, step: StepRecord) -> None:
        self.raw = None
        if step.clips or self._rewrites:
            self.raw = {name: g.clone() for name, g in self.gradients().items()}
        for clip in step.clips:
            clip.apply_(self._params)

    def _follow(self, step: StepRecord) -> None:
        """Set hyperparameters, modes and what trains as they were at this step."""
        if step.groups is not self._groups:
            for group, hyper in zip(self._optimizer.param_groups, step.groups, strict=True):
                group.update(as_held(hyper, self.device))
            self._groups, self._rewrites = step.groups, rewrites_gradients(self._optimizer)
        if step.modes is not self._modes and step.modes:
            self._follow_modes(step.modes)
            self._modes = step.modes
        if step.without_grad is not self._none or step.frozen != self._frozen:
            for name, param in self._params.items():
                param.requires_grad_(name not in step.without_grad and name not in step.frozen)
            self._trained = [self._params[name] for name in self._held if name not in step.without_grad]
            self._none, self._frozen = step.without_grad, step.frozen

    def _follow_modes(self, modes: Mapping[str, bool]) -> None:
        for name, module in self._modules.items():
            module.training = modes.get(name, module.training)

    def _compare(self, step: StepRecord) -> None:
        if step.fingerprint is None:
            return
        replayed = self._told()
        difference = gradient_difference(step.fingerprint, replayed)
        if difference == 0.0:
            return
        self.differences[step.index] = difference
        trained = max((tolerance(param.dtype) for param in self._trained), default=0.0)
        if difference > trained:
            suspected = suspects(self._trajectory.steps, step.index)
            for suspect in suspected:
                self._look_at_data(self._trajectory.steps[suspect])
            otherwise = differing(self._trajectory.manifest, str(self.device))
            little = sorted((t, by) for t, by in self.differences.items() if t < step.index and by <= trained)
            if any(by > _GROWN * trained for _, by in little):
                raise MismatchError(explain_drift(step, difference, little[0], otherwise))
            if len(suspected) == 1 and self._was_left(step):
                raise MismatchError(explain_left(step, replayed))
            kept = outlived(step, self._held)
            compiled = bool(self._trajectory.manifest.extra.get("compiled"))
            raise MismatchError(
                explain_gradient(step, replayed, len(suspected) - 1, otherwise, kept, compiled=compiled)
            )

    def _told(self) -> Tensor:
        """The fingerprint of the gradients as they are held, of the optimizer's parameters."""
        return self._fingerprint([p.grad if name in self._held else None for name, p in self._params.items()])

    def _was_left(self, step: StepRecord) -> bool:
        """Whether the recorded gradient is the replayed one and that of the step before, which was left there."""
        if not step.index or step.scale is not None or step.fingerprint is None:
            return False
        other = Replayer(self._problem, self._trajectory, check=False)
        other.restore(self._trajectory.state(self._trajectory.nearest(step.index - 1)))
        for earlier in self._trajectory.steps[other.step : step.index]:
            other.advance(earlier)
        left, own = other.gradients(), self.gradients()
        for name, param in self._params.items():
            if name in own:
                param.grad = own[name] + left[name] if name in left else own[name].clone()
        self._clip(step)
        both = self._told()
        return gradient_difference(step.fingerprint, both) <= max(
            (tolerance(param.dtype) for param in self._trained), default=0.0
        )

    def _look_at_data(self, step: StepRecord) -> None:
        """Refuse batches without digests whose content is not the one that other steps' digests tell, if they do."""
        known, told = contents(self._trajectory.steps, len(self._problem.data))
        for ids, digests, epoch in zip(step.batches, step.digests, step.epochs, strict=True):
            if digests is None:
                found = batch_digests(self.source.fetch(ids, epoch=epoch), len(ids)).cpu()
                self._checked(ids, torch.where(told[ids], known[ids], found), epoch, step.index)

    def _second_look(self, ids: Tensor, digests: Tensor, epoch: int, step: int) -> Any:
        batch = self.source.fetch(ids, epoch=epoch, fresh=True)
        if _same(digests, batch, ids):
            return batch
        raise MismatchError(
            explain_data(
                lambda wanted: self.source.fetch(wanted, epoch=epoch, fresh=True),
                len(self._problem.data),
                ids,
                digests,
                batch,
                self._trajectory.manifest.batch,
                step,
                lambda: self.source.draws(ids, epoch),
            )
        )


def _same(digests: Tensor, batch: Any, ids: Tensor) -> bool:
    return torch.equal(batch_digests(batch, len(ids)).cpu(), digests)


def _dense(grad: Tensor) -> Tensor:
    return grad if grad.layout == torch.strided else grad.to_dense()
