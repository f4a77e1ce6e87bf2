"""Representer points: the prediction as a sum over training examples, at the last linear layer."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from hydragrad.attribution import Attribution
from hydragrad.baselines.gradients import MEMORY, Setting
from hydragrad.errors import MismatchError, UnsupportedError, message
from hydragrad.run import Run


def representer(
    run: Run,
    queries: Any,
    *,
    layer: str | None = None,
    strength: float = 0.003,
    measurement: Callable[[nn.Module, Any], Tensor] | None = None,
    memory: int = MEMORY,
) -> Attribution:
    """Representer points (Yeh, Kim, Yen, Ravikumar, 2018) of a final linear layer f(x) = W phi(x) (+ b).

    If W minimises (1/N) sum_i loss_i + strength ||W||^2, then f(x) = sum_i alpha_i (phi_i . phi(x)) with

        alpha_i = -1 / (2 strength N) dloss_i/df_i

    so that without example i the measurement rises, to first order, by

        score[i, j] = -(dm_j/df_j . alpha_i) (phi_i . phi_j)

    ``layer``: the module's name (None: the last nn.Linear); a bias counts as a feature of 1; positions of a sequence
    add. ``strength``: lambda of the source (its 0.003); only the scale depends on it, as the layer is taken as it was
    trained, not trained further. Raises MismatchError, UnsupportedError, NonFiniteError. Source: arXiv 1811.09720.
    Example: ``hydragrad.baselines.representer(run, test_set, layer="classifier.6")``.
    """
    if strength <= 0:
        raise UnsupportedError(message("strength is too small", expected="above 0", got=strength))
    name = _last_linear(run) if layer is None else layer
    module = dict(run.problem.model.named_modules()).get(name)
    if not isinstance(module, nn.Linear):
        raise MismatchError(
            message(
                "representer points need a linear layer",
                expected="the name of an nn.Linear, as model.named_modules() gives it",
                got=f"{name!r}: {type(module).__name__}",
            )
        )
    setting = Setting(run, queries, layer=name, measurement=measurement, memory=memory)
    # dloss/dW = dloss/df phi^T: the formula above is the product of two gradients of that layer
    values = setting.products(setting.end()) / (2 * strength * run.num_examples)
    return setting.answer(values, "representer", f"representer points of layer {name!r}, lambda {strength:g}")


def _last_linear(run: Run) -> str:
    linear = [name for name, module in run.problem.model.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        raise UnsupportedError(message("the model has no nn.Linear", expected="a final linear layer"))
    return linear[-1]
