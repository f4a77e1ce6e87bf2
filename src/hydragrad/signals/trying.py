"""The losses of the training examples with every label tried: the model is run once an input, the loss once a label."""

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import default_collate

from hydragrad.copying import copy_of
from hydragrad.errors import HydragradError, MismatchError, message
from hydragrad.labels import Relabel, with_label
from hydragrad.run import Run
from hydragrad.trajectory.batches import BatchSource
from hydragrad.trajectory.state import State

_LEAST = 16
_TIMES = 4
"""Examples run together: at least so many, and so many times a batch of the training, which held gradients too."""
_SAME = 1e-4
"""Relative difference of losses that are the same: other kernels, never another model."""


@final
class LabelLosses:
    """loss_i with its own label [N] and with each label c of ``classes`` [N, C], at any state, in evaluation mode.

    ``data``: the training data, unless others are given. What the model made of an input for one label is handed out
    for the next, where its arguments are equal. That this gives what running it every time gives is seen on the first
    examples; else (a loss that changes its batch in place, a model that keeps a state) it is run every time. Losses of
    tokens are summed over them.
    """

    def __init__(self, run: Run, classes: Sequence[int] = (), relabel: Relabel = with_label, data: Any = None) -> None:
        problem, mode = run.problem, run.trajectory.manifest.collate["mode"]
        data = problem.data if data is None else data
        self._problem, self._count = problem, len(data)
        self._model = copy_of(problem.model).eval()
        self._calls = _Calls(self._model.forward)
        self._model.__dict__["forward"] = self._calls  # on this private copy
        device = next((parameter.device for parameter in self._model.parameters()), torch.device("cpu"))
        self._together = 1 if mode == "index" else _TIMES * max(_LEAST, _largest_batch(run))
        self._source = BatchSource(data, problem.collate, device, mode)
        self._others = {
            label: BatchSource(_Relabelled(data, label, relabel), problem.collate, device, mode) for label in classes
        }
        self._in_batches = mode == "samples" and problem.collate is default_collate and relabel is with_label
        self._once: bool | None = None

    @torch.no_grad()
    def __call__(self, state: State) -> tuple[Tensor, Tensor]:
        """``(own [N], tried [N, C])`` on the CPU."""
        for name, tensor in (*self._model.named_parameters(), *self._model.named_buffers()):
            tensor.copy_(state.params[name] if name in state.params else state.buffers[name])
        losses = torch.cat([self._of(ids) for ids in torch.arange(self._count).split(self._together)])
        return losses[:, 0], losses[:, 1:]

    def _of(self, ids: Tensor) -> Tensor:
        """[b, 1 + C]."""
        labels = [None, *self._others]
        if self._once is None:
            ends = [0, len(labels) - 1]
            each = self._measured(ids, [labels[k] for k in ends], once=False)
            self._once = torch.allclose(self._measured(ids, labels)[:, ends], each, _SAME, _SAME, equal_nan=True)
        return self._measured(ids, labels, once=self._once)

    def _measured(self, ids: Tensor, labels: Sequence[int | None], once: bool = True) -> Tensor:
        """The losses [b, len(labels)]; None: with their own labels."""
        self._calls.forget()
        own, columns = self._source.fetch(ids), []
        for label in labels:
            if once:
                self._calls.again()
            else:
                self._calls.forget()
                own = self._source.fetch(ids)
            try:
                batch = own if label is None else self._relabelled(own, ids, label)
                losses = self._problem.losses(self._model, batch, len(ids))
            except (HydragradError, torch.OutOfMemoryError, MemoryError):
                raise
            except Exception as error:  # whatever the user's own code raises
                tried = "their own labels" if label is None else f"label {label}"
                raise MismatchError(
                    message(
                        f"examples {int(ids[0])} to {int(ids[-1])} have no loss with {tried}",
                        expected="a loss that takes the training data with every label that is tried",
                        got=f"{type(error).__name__}: {str(error)[:300]}",
                        remedy="give classes=: the labels that the model knows",
                    )
                ) from error
            columns.append(losses if losses.dim() == 1 else losses.sum(1))
        self._calls.forget()
        return torch.stack(columns, 1).cpu()

    def _relabelled(self, batch: Any, ids: Tensor, label: int) -> Any:
        made = with_label_everywhere(batch, len(ids), label) if self._in_batches else None
        return self._others[label].fetch(ids) if made is None else made


def el2n(p: Tensor, own: Tensor) -> Tensor:
    """||p_i - onehot(own_i)|| [N] of p [N, C]: how far the probabilities are from the given labels."""
    return p.scatter_add(1, own[:, None], -torch.ones_like(p[:, :1])).norm(dim=1)


def with_label_everywhere(batch: Any, examples: int, label: int) -> Any:
    """A batch that torch's own collation made of (..., label) samples, with one label everywhere; None: it is none."""
    given = batch[-1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if not isinstance(given, Tensor) or given.numel() != examples or given.is_floating_point() or given.is_complex():
        return None
    parts = [*batch[:-1], torch.full_like(given, label)]
    kind: Any = type(batch)
    return kind(*parts) if hasattr(batch, "_fields") else kind(parts)


@final
class _Calls:
    """The calls of a model while one batch is gone through: each is made once for as long as its arguments stay."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self._forward = forward
        self._made: list[tuple[Any, Any]] = []
        self._place = 0

    def forget(self) -> None:
        """Run the model from now on."""
        self._made, self._place = [], 0

    def again(self) -> None:
        """The same batch comes again from its start."""
        self._place = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        place, self._place = self._place, self._place + 1
        given = pytree.tree_flatten((args, kwargs))
        if place < len(self._made) and _equal(self._made[place][0], given):
            return self._made[place][1]
        self._made[place:] = [(given, self._forward(*args, **kwargs))]
        return self._made[place][1]


def _equal(a: Any, b: Any) -> bool:
    """Whether two flattened sets of arguments are the same, tensors by their content."""
    if a[1] != b[1]:
        return False
    for x, y in zip(a[0], b[0], strict=True):
        if isinstance(x, Tensor) != isinstance(y, Tensor):
            return False
        if x is y or (isinstance(x, Tensor) and x.dtype == y.dtype and x.device == y.device and torch.equal(x, y)):
            continue
        if isinstance(x, Tensor) or type(x) is not type(y) or not bool(x == y):
            return False
    return True


def _largest_batch(run: Run) -> int:
    return max((len(ids) for step in run.steps for ids in step.batches), default=0)


@final
class _Relabelled:
    """The data with one label everywhere."""

    def __init__(self, data: Any, label: int, relabel: Relabel) -> None:
        self._data, self._label, self._relabel = data, label, relabel

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, place: int) -> Any:
        return self._relabel(self._data[place], self._label)
