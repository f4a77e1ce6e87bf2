"""Products of gradients along the run or at its end, without any curvature: TracIn, gradient dot and cosine."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hydragrad.attribution import Attribution
from hydragrad.baselines.gradients import MEMORY, Setting
from hydragrad.errors import MismatchError, message
from hydragrad.run import Run
from hydragrad.shapes import Float
from hydragrad.trajectory.state import State


def tracin(
    run: Run,
    queries: Any,
    *,
    checkpoints: Sequence[int] | None = None,
    layer: str | None = None,
    measurement: Callable[[nn.Module, Any], Tensor] | None = None,
    memory: int = MEMORY,
) -> Attribution:
    """TracInCP (Pruthi, Liu, Kale, Sundararajan, 2020): gradient products summed over stored states of the run.

        score[i, j] = sum over t in checkpoints of lr_t grad loss_i(w_t) . grad m_j(w_t)

    ``checkpoints``: steps (None: the stored ones but the untrained one; others are replayed); lr_t: the recorded
    learning rate of each parameter at step t (at the end: of the last step). The formula is that of plain SGD:
    momentum and adaptive optimizers' scaling do not enter. Sign of ``hydragrad.attribute``; a scale of its own: each
    state counts as one step on each example alone. ``layer``: that module only (TracInCPFast: the last layer).
    Raises MismatchError, NonFiniteError. Source: arXiv 2002.08484.
    Example: ``hydragrad.baselines.tracin(run, test_set, layer="classifier")``.
    """
    setting = Setting(run, queries, layer=layer, measurement=measurement, memory=memory)
    assert setting.columns is not None
    steps = _steps(run, checkpoints)
    values = torch.zeros(run.num_examples, setting.columns.count, dtype=setting.dtype)
    for step in steps:
        state = _state(setting, step)
        rates = _rates(setting, step)
        values += setting.products(state, lambda rows, rates=rates: rows * rates)
    return setting.answer(values, "tracin", f"TracIn at the recorded learning rates, steps {list(steps)}")


def tracin_self(
    run: Run, *, checkpoints: Sequence[int] | None = None, layer: str | None = None, memory: int = MEMORY
) -> Float[Tensor, " N"]:
    """TracIn's self-influence, sum over t of lr_t ||grad loss_i(w_t)||^2: large for unusual or wrongly labelled ones.

    Arguments as in ``tracin``. On the CPU, in the run's dtype.
    Example: ``hydragrad.baselines.tracin_self(run).argsort(descending=True)[:10]``.
    """
    setting = Setting(run, layer=layer, memory=memory)
    total = torch.zeros(run.num_examples, dtype=setting.dtype)
    for step in _steps(run, checkpoints):
        rates = _rates(setting, step)
        for ids, rows in setting.rows(_state(setting, step)):
            total[ids] += (rows.square() @ rates).cpu()
    return total


def gradient_dot(
    run: Run,
    queries: Any,
    *,
    layer: str | None = None,
    measurement: Callable[[nn.Module, Any], Tensor] | None = None,
    memory: int = MEMORY,
) -> Attribution:
    """Gradient products grad loss_i . grad m_j at the trained parameters: what one more step on i does.

    Sign of ``hydragrad.attribute``; no scale. Arguments and errors as in ``tracin``.
    Example: ``hydragrad.baselines.gradient_dot(run, test_set).top(query=0)``.
    """
    setting = Setting(run, queries, layer=layer, measurement=measurement, memory=memory)
    return setting.answer(setting.products(setting.end()), "gradient-dot", "gradient products at the last step")


def gradient_cosine(
    run: Run,
    queries: Any,
    *,
    layer: str | None = None,
    measurement: Callable[[nn.Module, Any], Tensor] | None = None,
    memory: int = MEMORY,
) -> Attribution:
    """Gradient cosines grad loss_i . grad m_j / (||grad loss_i|| ||grad m_j||) at the trained parameters (0 for a 0).

    Sign of ``hydragrad.attribute``; no scale. Arguments and errors as in ``tracin``.
    Example: ``hydragrad.baselines.gradient_cosine(run, test_set).top(query=0)``.
    """
    setting = Setting(run, queries, layer=layer, measurement=measurement, memory=memory)
    state = setting.end()
    lengths = torch.empty(run.num_examples, dtype=setting.dtype)
    for ids, rows in setting.rows(state):
        lengths[ids] = rows.norm(dim=1).cpu()
    smallest = torch.finfo(setting.dtype).tiny
    values = setting.products(state, lambda rows: rows / rows.norm(dim=1, keepdim=True).clamp_min(smallest))
    values /= lengths.clamp_min(smallest).unsqueeze(1)
    return setting.answer(values, "gradient-cosine", "gradient cosines at the last step")


def _steps(run: Run, checkpoints: Sequence[int] | None) -> tuple[int, ...]:
    if checkpoints is None:
        return tuple(step for step in run.trajectory.checkpoints if step > 0) or (run.num_steps,)
    steps = tuple(int(step) for step in checkpoints)
    if not steps or min(steps) < 0 or max(steps) > run.num_steps:
        raise MismatchError(message("no such checkpoints", expected=f"steps 0 to {run.num_steps}", got=list(steps)[:8]))
    return steps


def _state(setting: Setting, step: int) -> State:
    return setting.placed(next(setting.run.states(step, step + 1)))


def _rates(setting: Setting, step: int) -> Tensor:
    """The learning rate of every parameter at a step, [P]."""
    run = setting.run
    record = run.steps[min(step, run.num_steps - 1)]
    named = zip(run.trajectory.manifest.optimizer["groups"], record.groups, strict=True)
    rate = {name: float(group["lr"]) for names, group in named for name in names}
    params = run.trajectory.manifest.params
    sizes = [int(torch.tensor(params[name]["shape"]).prod()) for name in setting.names]
    parts = [torch.full((n,), rate[name], dtype=setting.dtype) for name, n in zip(setting.names, sizes, strict=True)]
    return torch.cat(parts).to(setting.device)
