"""bergson 2.5.1: MAGIC, the exact hypergradient by reverse mode through training, one backward pass a query."""

# pyright: reportMissingImports=false

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
import torchopt
from bergson.magic.trainer import BackwardState, Trainer, TrainerState
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torchopt.pytree import tree_iter

from comparison.exchange import Answer, Folder, UnfitError, work

_EPS_ROOT = 1e-17
"""bergson's own default; with 0 the square root's derivative at 0 makes every score NaN, without a word."""


class _Weighted(nn.Module):
    """The weighted mean loss of a batch, called as its trainer calls a language model."""

    def __init__(self, folder: Folder) -> None:
        super().__init__()
        self.net, self.loss = folder.model(0).train(), folder.loss

    def forward(self, input_ids: Tensor, inputs: Tensor, targets: Tensor, example_weight: Tensor) -> Tensor:
        return (self.loss(self.net, (inputs, targets)) * example_weight).mean()


class _Stream:
    """The recorded batches, in the shape of bergson's DataStream."""

    device = torch.device("cpu")

    def __init__(self, folder: Folder) -> None:
        self.tensors, self.batches = folder.train.tensors, folder.batches
        self.weights = nn.Parameter(torch.ones(len(folder.train), dtype=folder.dtype))

    @property
    def requires_grad(self) -> bool:
        return self.weights.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self.weights.requires_grad = value

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, step: int) -> dict[str, Tensor]:
        ids = self.batches[step]
        inputs, targets = (tensor[ids] for tensor in self.tensors)
        counted = torch.zeros(len(ids), 2)  # `input_ids` [b, L] is asked for its size alone
        return {"input_ids": counted, "inputs": inputs, "targets": targets, "example_weight": self.weights[ids]}


def magic(folder: Folder) -> Answer:
    model = _Weighted(folder)
    if list(model.buffers()):
        raise UnfitError("takes buffers that training changes (BatchNorm's statistics) for constants")
    trainer, state = Trainer.initialize(model, _optimizer(folder))
    stream: Any = _Stream(folder)
    # fused attention has no second derivative
    with tempfile.TemporaryDirectory() as scratch, sdpa_kernel(SDPBackend.MATH):
        states = f"{scratch}/states"
        state = trainer.train(state, stream, save_dir=states, inplace=True)
        kept = set(Path(states).iterdir())
        final = state.to("cpu").detach_()
        _same_run(folder, final)
        columns = []
        for gradient in _query_gradients(folder, final):
            state.detach_()
            state.copy_(final)
            columns.append(_backward(trainer, stream, states, state, gradient))
            for extra in set(Path(states).iterdir()) - kept:
                shutil.rmtree(extra)
    return Answer(-torch.stack(columns, 1), note=f"one backward pass a query, sqrt checkpoints, eps_root {_EPS_ROOT:g}")


def _optimizer(folder: Folder) -> Any:
    options = dict(folder.about.options)
    if folder.about.optimizer == "adamw":
        return torchopt.adamw(eps_root=_EPS_ROOT, **options)
    return torchopt.sgd(**options)


def _same_run(folder: Folder, final: TrainerState) -> None:
    """Its own training ends where the recorded one did, or its answer would be another run's."""
    recorded = folder.state(folder.about.checkpoints[-1])
    gap = max(float((final.params[f"net.{name}"] - value).abs().max()) for name, value in recorded.items())
    if not gap < 1e-2:
        raise RuntimeError(f"its training ended {gap:.2g} away from the recorded parameters")


def _query_gradients(folder: Folder, final: TrainerState) -> list[dict[str, Tensor]]:
    model = folder.model()
    params = {name.removeprefix("net."): value.clone().requires_grad_() for name, value in final.params.items()}
    losses = folder.loss(lambda x: torch.func.functional_call(model, params, (x,)), folder.queries.tensors)
    rows = [torch.autograd.grad(loss, list(params.values()), retain_graph=True) for loss in losses]
    return [{f"net.{name}": part for name, part in zip(params, row, strict=True)} for row in rows]


def _backward(trainer: Trainer, stream: Any, states: str, state: TrainerState, gradient: dict[str, Tensor]) -> Tensor:
    moments = [x for x in tree_iter(state.opt_state) if isinstance(x, Tensor) and x.is_floating_point()]
    began = BackwardState(gradient, [torch.zeros_like(x) for x in moments], torch.zeros_like(stream.weights))
    stream.requires_grad = True
    ended = trainer.backward(states, stream, began, state, cleanup=False, inplace=True)
    return ended.weight_grads.detach().clone()


METHODS = {"bergson-magic": magic}

if __name__ == "__main__":
    work(METHODS)
