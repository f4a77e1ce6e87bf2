"""Influence functions with a Kronecker-factored curvature (KFAC, EKFAC), through curvlinops."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, final

import torch
from torch import Tensor, nn

from hydragrad.attribution import Attribution
from hydragrad.baselines.gradients import MEMORY, Setting, flat, unflat
from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.run import Run, kept_random_state
from hydragrad.trajectory.state import State

_FISHERS = ("type-2", "mc", "empirical")


def kfac(
    run: Run,
    queries: Any,
    *,
    corrected: bool = False,
    damping: float = 0.01,
    criterion: nn.Module | None = None,
    fisher: str = "type-2",
    batch: int = 256,
    measurement: Callable[[nn.Module, Any], Tensor] | None = None,
    memory: int = MEMORY,
    seed: int = 0,
) -> Attribution:
    """Influence functions whose curvature is a Kronecker product per layer (Martens and Grosse, 2015), or EKFAC.

        score[i, j] = grad m_j^T (A x B + damping I)^{-1} grad loss_i / N        (block by block)

    ``corrected``: EKFAC, the eigenvalues corrected in the Kronecker factors' basis (George et al., 2018; influence:
    Grosse et al., 2023). Curvature of the mean training loss at the trained parameters, evaluation mode; sign and scale
    of ``hydragrad.attribute``. Samples must be (input, target), the loss that of ``criterion``: nn.CrossEntropyLoss()
    (the default), nn.MSELoss() or nn.BCEWithLogitsLoss(); every trained parameter must belong to an nn.Linear or
    nn.Conv2d. ``fisher``: "type-2" (the exact expectation over labels), "mc" (one label drawn per example, under
    ``seed``) or "empirical". Needs ``pip install 'hydragrad[baselines]'``. Raises UnsupportedError, MismatchError,
    NonFiniteError. Sources: arXiv 1503.05671, 1806.03884, 2308.03296.
    Example: ``hydragrad.baselines.kfac(run, test_set, corrected=True)``.
    """
    library = _curvlinops()
    if fisher not in _FISHERS:
        raise UnsupportedError(message("unknown fisher", expected=f"one of {_FISHERS}", got=repr(fisher)))
    setting = Setting(run, queries, measurement=measurement, memory=memory)
    state = setting.end()
    chosen = nn.CrossEntropyLoss() if criterion is None else criterion
    data = _Pairs(setting, state, chosen, batch)
    model = setting.objective.module
    _load(model, state)
    params = [dict(model.named_parameters())[name] for name in setting.names]
    _check_layers(model, setting.names)
    kind = library.EKFACLinearOperator if corrected else library.KFACLinearOperator
    with kept_random_state(), torch.enable_grad():
        factors = kind(
            model,
            chosen,
            params,
            data,
            fisher_type=fisher,
            seed=seed,
            separate_weight_and_bias=False,
            check_deterministic=False,
            num_data=run.num_examples,
        )
        inverse = library.KFACInverseLinearOperator(factors, damping=damping, use_exact_damping=True)

        def solve(rows: Tensor) -> Tensor:
            parts = [part.movedim(0, -1) for part in unflat(rows, tuple(params))]
            return flat([part.movedim(-1, 0) for part in inverse @ parts]).detach()

        values = setting.products(state, solve) / run.num_examples
    name = "ekfac" if corrected else "kfac"
    return setting.answer(
        values,
        name,
        f"influence functions: {name.upper()} of the mean training loss at the last step, {fisher} Fisher, "
        f"damping {damping:g}",
    )


def _curvlinops() -> Any:
    try:
        with warnings.catch_warnings():
            # one of its dependencies scripts functions at import, which torch calls deprecated
            warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")
            import curvlinops  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UnsupportedError(
            message(
                "kfac needs curvlinops, which is not installed",
                got=str(error),
                remedy="pip install 'hydragrad[baselines]'",
            )
        ) from error
    return curvlinops


@final
class _Pairs:
    """The training set as (inputs, targets), batch by batch, each compared with the run's own loss."""

    def __init__(self, setting: Setting, state: State, criterion: nn.Module, batch: int) -> None:
        self.setting, self.state, self.batch = setting, state, batch
        point = setting.point(state, next(setting.chunks(batch)))
        pair = point.batch
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(x, Tensor) for x in pair)):
            raise UnsupportedError(
                message("kfac needs pairs", expected="samples (input, target) of two tensors", got=type(pair).__name__)
            )
        with torch.no_grad(), setting.objective.differentiable():
            ours = (point.coefficients * setting.objective.losses(point.params, point.rest, pair)).sum()
            tensors = dict(zip(setting.names, point.params, strict=True)) | point.rest
            outputs = torch.func.functional_call(setting.objective.module, tensors, (pair[0],))
            try:
                theirs = criterion(outputs, pair[1])
            except (RuntimeError, ValueError) as error:
                raise UnsupportedError(
                    message(
                        "the criterion does not take the model's outputs as they are",
                        expected=f"outputs and targets for {criterion}",
                        got=f"shapes {list(outputs.shape)} and {list(pair[1].shape)}: {error}",
                        remedy="give criterion=, or choose influence(..., solver='cg'), which takes every loss",
                    )
                ) from error
        mean = ours / point.coefficients.shape[0]
        if not torch.allclose(mean, theirs, rtol=1e-4, atol=1e-6):
            raise MismatchError(
                message(
                    "the criterion is not the run's loss",
                    expected=f"a mean loss of {float(mean):.6g} on the first batch",
                    got=f"{float(theirs):.6g} from {criterion}",
                    cause="a loss of another form (weights, smoothing, several outputs), or another criterion",
                    remedy="give criterion=; for a loss that no criterion is, choose influence(..., solver='cg')",
                )
            )

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for ids in self.setting.chunks(self.batch):
            inputs, targets = self.setting.point(self.state, ids).batch
            yield inputs, targets


def _load(model: nn.Module, state: State) -> None:
    with torch.no_grad():
        for name, param in model.named_parameters():
            param.copy_(state.params[name])
        for name, buffer in model.named_buffers():
            buffer.copy_(state.buffers[name])


def _check_layers(model: nn.Module, names: tuple[str, ...]) -> None:
    modules = dict(model.named_modules())
    for name in names:
        owner = modules[name.rpartition(".")[0]]
        if not isinstance(owner, nn.Linear | nn.Conv2d):
            raise UnsupportedError(
                message(
                    f"parameter {name!r} belongs to no layer that kfac knows",
                    expected="nn.Linear and nn.Conv2d",
                    got=type(owner).__name__,
                    remedy="choose influence(..., solver='cg', curvature='gauss-newton'), which knows every model",
                )
            )
