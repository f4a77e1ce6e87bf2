"""The losses of one batch as pure functions of the parameters: what every derivative here starts from."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from hydragrad.errors import UnsupportedError, message
from hydragrad.problem import Problem
from hydragrad.step.buffers import Attached, PureStatistics, running_statistics
from hydragrad.step.draws import HandOut, captured
from hydragrad.step.forms import form_of
from hydragrad.step.plain_forms import activations_kept, forms_needed, plain_forms

_HARMLESS = (
    "There is a performance drop because we have not yet implemented the batching rule",  # vmap loops; we measure that
    "TF32 acceleration on top of oneDNN",  # said by torch's own context manager that switches oneDNN off
)

Vectors = tuple[Tensor, ...]
"""One tensor a trainable parameter: a point ``[*shape]``, or a block of K vectors ``[K, *shape]``."""


@final
@dataclass(frozen=True)
class Point:
    """Where one micro-batch's objective J(w, v; eps) = sum_i c_i (1 + eps_i) loss_i(w, v) is differentiated.

    ``params`` w_t; ``rest``: frozen parameters and other buffers; ``coefficients`` c and ``weights`` 1 + eps, each with
    the shape of the losses; ``carried`` v_t: the buffers that training changes; ``draws``: the random numbers of the
    forward pass, in order; ``first``: of its step, so that a penalty is added to J.
    """

    params: Vectors
    rest: dict[str, Tensor]
    batch: Any
    coefficients: Tensor
    weights: Tensor
    carried: Vectors = ()
    draws: Vectors = ()
    first: bool = False


@final
class _Penalty(nn.Module):
    """The user's ``penalty(model)``, likewise."""

    def __init__(self, model: nn.Module, problem: Problem) -> None:
        super().__init__()
        self.model = model
        self.problem = problem

    def forward(self) -> Tensor:
        return self.problem.penalty_of(self.model)


@final
class _Losses(nn.Module):
    """The user's ``loss(model, batch)`` as a module, so that functional_call can swap the parameters below it."""

    def __init__(self, model: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss = loss

    def forward(self, batch: Any) -> Tensor:
        return self.loss(self.model, batch)


@final
class Objective:
    """Pure functions of ``(params, rest, batch, carried, draws)`` over a private copy of the model.

    ``names``: what ``params`` are; ``carried``: names of the float buffers that training changes, given and returned
    as values; ``counters``: those of other buffers that it changes, which only steer (num_batches_tracked).
    """

    def __init__(
        self,
        problem: Problem,
        module: nn.Module,
        names: Sequence[str],
        carried: Sequence[str] = (),
        counters: Sequence[str] = (),
    ) -> None:
        self.problem = problem
        self.names, self.carried, self.counters = tuple(names), tuple(carried), tuple(counters)
        self.module = module
        self._losses = _Losses(module, problem.loss)
        self._penalty = _Penalty(module, problem)
        self.fragile = any(isinstance(part, nn.RNNBase) for part in module.modules())
        self._forms = forms_needed(module)
        self._devices = {"cpu", *(p.device.type for p in self.module.parameters())}
        self._foreign = not {*carried} <= running_statistics(module)  # buffers that no layer of torch's own changes
        self._modules = dict(module.named_modules())
        self._modes: Mapping[str, bool] | None = None
        self._known_modes = {self._training(): 0}
        self.mode = 0
        """A number for the modes the submodules are in: what is computed, and any graph of it, depends on them."""
        self._shapes: dict[Any, torch.Size] = {}

    def follow_modes(self, modes: Mapping[str, bool]) -> None:
        """Put every submodule in the mode (training or evaluation) that the step was taken in."""
        if modes and modes is not self._modes:
            for name, part in self._modules.items():
                part.training = modes.get(name, part.training)
            self._modes = modes
            self.mode = self._known_modes.setdefault(self._training(), len(self._known_modes))

    def _training(self) -> frozenset[str]:
        return frozenset(name for name, part in self._modules.items() if part.training)

    def loss_shape(self, point: Point, examples: int) -> torch.Size:
        """The shape of the losses of a batch, found by running it once for every form of batch."""
        key = (examples, form_of(point.batch, []))
        if key not in self._shapes:
            with torch.enable_grad():
                losses = self.losses(point.params, point.rest, point.batch, point.carried, point.draws)
            self._shapes[key] = self.problem.checked(losses, examples).shape
        return self._shapes[key]

    def drawn(self, point: Point) -> Vectors:
        """The random numbers that the forward pass draws from the present random state, in order."""
        with self.differentiable(), torch.enable_grad():  # nothing needs gradients but what the loss itself asks for
            tensors = self._tensors(point.params, point.rest, point.carried)
            return captured(lambda: self._run(tensors, point.batch, None))[1]

    def after(self, point: Point) -> tuple[Vectors, dict[str, Tensor]]:
        """``(carried, rest)`` as the forward pass leaves them: where the next micro-batch starts."""
        with self.differentiable(), torch.enable_grad():
            tensors = self._tensors(point.params, point.rest, point.carried)
            self._run(tensors, point.batch, HandOut(point.draws) if point.draws else None)
        moved = {name: tensors[f"model.{name}"] for name in self.counters}
        return tuple(v.detach() for v in self._carried_of(tensors)), {**point.rest, **moved}

    def losses(
        self, params: Vectors, rest: dict[str, Tensor], batch: Any, carried: Vectors = (), draws: Vectors = ()
    ) -> Tensor:
        """Per-example losses, ``[b]`` or ``[b, L]``."""
        return self.evaluate(params, rest, batch, carried, draws)[0]

    def evaluate(
        self, params: Vectors, rest: dict[str, Tensor], batch: Any, carried: Vectors = (), draws: Vectors = ()
    ) -> tuple[Tensor, Vectors]:
        """Per-example losses, and V(w, v): the carried buffers after the forward pass."""
        tensors = self._tensors(params, rest, carried)
        losses = self._run(tensors, batch, HandOut(draws) if draws else None)
        return losses, self._moved(tensors, params, rest, batch, carried, draws)

    def scalar(self, point: Point, params: Vectors, carried: Vectors, weights: Tensor, tau: Vectors) -> Tensor:
        """J + tau . V, at other params, buffers and weights than the point's.

        Its gradient in tau is V: with tau = 0 beside w, whatever differentiates J takes the buffers along.
        """
        losses, after = self.evaluate(params, point.rest, point.batch, carried, point.draws)
        total = (point.coefficients * weights * losses).sum()
        if point.first:
            total = total + self.penalty(params, point)
        for t, v in zip(tau, after, strict=True):
            total = total + (t * v).sum()
        return total

    def penalty(self, params: Vectors, point: Point) -> Tensor:
        """The penalty at other params than the point's, []."""
        return torch.func.functional_call(self._penalty, self._tensors(params, point.rest, point.carried), ())

    def outputs(
        self, params: Vectors, rest: dict[str, Tensor], batch: Any, carried: Vectors = (), draws: Vectors = ()
    ) -> tuple[Vectors, list[Any], Vectors]:
        """Float tensors among the outputs of every call of the model within the loss, what restores the rest, and V."""
        calls: list[Any] = []
        spans: list[tuple[int, int]] = []
        forward = self.module.forward
        dealer = HandOut(draws) if draws else None

        def capture(*args: Any, **kwargs: Any) -> Any:
            first = dealer.position if dealer else 0
            calls.append(forward(*args, **kwargs))
            spans.append((first, dealer.position if dealer else 0))
            return calls[-1]

        tensors = self._tensors(params, rest, carried)
        with _forward_replaced(self.module, capture):
            self._run(tensors, batch, dealer)
        leaves, structure = pytree.tree_flatten(calls)
        floats = tuple(leaf for leaf in leaves if _differentiable(leaf))
        others = [structure, [None if _differentiable(leaf) else leaf for leaf in leaves], spans]
        return floats, others, self._moved(tensors, params, rest, batch, carried, draws)

    def head(
        self,
        floats: Vectors,
        others: list[Any],
        params: Vectors,
        rest: dict[str, Tensor],
        batch: Any,
        carried: Vectors = (),
        draws: Vectors = (),
    ) -> Tensor:
        """The losses from given model outputs, the model itself not run."""
        structure, leaves, spans = others
        given = iter(floats)
        calls = iter(pytree.tree_unflatten([next(given) if leaf is None else leaf for leaf in leaves], structure))
        dealer, skipped = HandOut(draws) if draws else None, iter(spans)

        def forward(*args: Any, **kwargs: Any) -> Any:
            if dealer is not None:  # the model's draws are in its outputs; the loss's own are handed out
                dealer.position = next(skipped)[1]
            return next(calls)

        with _forward_replaced(self.module, forward):
            return self._run(self._tensors(params, rest, carried), batch, dealer)

    def _tensors(self, params: Vectors, rest: dict[str, Tensor], carried: Vectors) -> dict[str, Tensor]:
        """Everything by the name it has below the loss; what a forward pass may write to is copied."""
        tensors = {f"model.{name}": value for name, value in (*zip(self.names, params, strict=True), *rest.items())}
        for name in self.counters:
            tensors[f"model.{name}"] = tensors[f"model.{name}"].clone()
        tensors.update({f"model.{name}": v.clone() for name, v in zip(self.carried, carried, strict=True)})
        return tensors

    def _moved(
        self,
        tensors: dict[str, Tensor],
        params: Vectors,
        rest: dict[str, Tensor],
        batch: Any,
        carried: Vectors,
        draws: Vectors,
    ) -> Vectors:
        """V from the ``tensors`` of a forward pass; by one more that detaches nothing, if a layer of the user's may."""
        if self._foreign:
            tensors = self._tensors(params, rest, carried)
            with Attached():
                self._run(tensors, batch, HandOut(draws) if draws else None)
        return self._carried_of(tensors)

    def _carried_of(self, tensors: dict[str, Tensor]) -> Vectors:
        return tuple(tensors[f"model.{name}"] for name in self.carried)

    def _run(self, tensors: dict[str, Tensor], batch: Any, dealer: HandOut | None) -> Tensor:
        """The losses; ``tensors`` then hold what the forward pass left in them."""
        if dealer is None and not self.carried:
            return torch.func.functional_call(self._losses, tensors, (batch,))
        with contextlib.ExitStack() as stack:
            if dealer is not None:
                stack.enter_context(dealer)
            statistics = stack.enter_context(PureStatistics())
            losses = torch.func.functional_call(self._losses, tensors, (batch,))
        if dealer is not None:
            dealer.finish()
        for name in self.carried:
            tensors[f"model.{name}"] = statistics.after(tensors[f"model.{name}"])
        return losses

    def check_split(self, point: Point) -> None:
        """Refuse a loss that uses the parameters beside the model's outputs: it has no Gauss-Newton matrix J^T H J."""
        params = tuple(p.detach().requires_grad_() for p in point.params)
        given = (point.rest, point.batch, point.carried, point.draws)
        floats, others, _ = self.outputs(point.params, *given)
        try:
            losses = self.head(tuple(f.detach() for f in floats), others, params, *given)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # what asks for gradients of the outputs, which here come from nowhere
            raise UnsupportedError(_unsplit("a loss that differentiates the model by itself")) from error
        direct: Sequence[Tensor | None] = [None]
        if losses.requires_grad:
            direct = torch.autograd.grad(losses.sum(), params, allow_unused=True)
        if not floats or any(g is not None and bool(g.any()) for g in direct):
            raise UnsupportedError(
                _unsplit("a loss that calls submodules of the model, or uses its parameters, directly")
            )

    @contextlib.contextmanager
    def differentiable(self) -> Iterator[None]:
        """Kernels that have the derivatives we need: unfused attention, unfused recurrent cells."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            for known in _HARMLESS:
                warnings.filterwarnings("ignore", message=known)
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            for kind in self._devices:
                if torch.is_autocast_enabled(kind):  # the caller's: derivatives are taken in full precision
                    stack.enter_context(torch.autocast(kind, enabled=False))
            stack.enter_context(plain_forms(self._forms))
            stack.enter_context(activations_kept())
            if self.fragile:  # oneDNN's and cuDNN's recurrent kernels have no second derivative
                stack.enter_context(torch.backends.mkldnn.flags(enabled=False))
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
            yield


def _unsplit(got: str) -> str:
    return message(
        "the loss has no Gauss-Newton form",
        expected="loss(model, batch) that uses the parameters only through the outputs of model(...)",
        got=got,
        remedy="call the model itself in the loss, or choose method='exact'",
    )


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


@contextlib.contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Shadow ``forward`` on this one object (a private copy) for a while."""
    shadowed = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if shadowed is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = shadowed
