"""dattri 0.3.0. Influence functions add over the batches of a loader: one full batch is given."""

# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import torch
from dattri.algorithm.dvemb import DVEmbAttributor
from dattri.algorithm.influence_function import IFAttributorCG, IFAttributorEKFAC
from dattri.algorithm.tracin import TracInAttributor
from dattri.algorithm.trak import TRAKAttributor
from dattri.task import AttributionTask
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from comparison.exchange import Answer, Folder, UnfitError, work

_PROJECTED = 512
_AT_ONCE = 40
"""Queries whose products with the Hessian over all training data fit into memory together: 4 GB on the digits."""


def loaders(folder: Folder, batch: int | None = None) -> tuple[Any, Any]:
    """Training data and queries in order."""
    sets: tuple[TensorDataset, ...] = (folder.train, folder.queries)
    train, queries = (DataLoader(s, batch_size=batch or len(s), shuffle=False) for s in sets)  # type: ignore[arg-type]
    return train, queries


def loss_of(folder: Folder, model: nn.Module, *, single: bool) -> Callable[[Any, Any], Tensor]:
    """Mean loss from parameters; `single`: of an example without its batch axis."""

    def loss(params: Any, data: Any) -> Tensor:
        inputs, targets = (x.unsqueeze(0) for x in data) if single else data
        return folder.loss(lambda x: torch.func.functional_call(model, params, (x,)), (inputs, targets)).mean()

    return loss


def task_of(folder: Folder, steps: list[int], *, single: bool, margin: bool = False) -> AttributionTask:
    model = folder.model()
    loss = loss_of(folder, model, single=single)

    def target(params: Any, data: Any) -> Tensor:  # log(p / (1 - p)), TRAK's output function
        value = loss(params, data)
        return -value - torch.log1p(-torch.exp(-value) + 1e-6)

    return AttributionTask(
        loss_func=target if margin else loss,
        model=model,
        checkpoints=[folder.state(step) for step in steps],
    )


def conjugate_gradients(folder: Folder) -> Answer:
    last = folder.about.checkpoints[-1:]
    attributor = IFAttributorCG(task_of(folder, last, single=False), max_iter=10, regularization=5e-3)
    train, _ = loaders(folder)
    attributor.cache(train)
    layers = [part for part in folder.model().modules() if list(part.parameters(recurse=False))]
    at_once = _AT_ONCE if all(isinstance(part, nn.Linear) for part in layers) else 1
    queries: Any = DataLoader(folder.queries, batch_size=at_once, shuffle=False)
    return Answer(attributor.attribute(train, queries), note=f"regularization 5e-3, 10 iterations, {at_once} at a time")


def ekfac(folder: Folder) -> Answer:
    folder.probabilities()
    model = folder.model()
    if not all(isinstance(part, nn.Linear) for part in model.modules() if list(part.parameters(recurse=False))):
        raise UnfitError("its EK-FAC knows linear layers alone")

    attributor = IFAttributorEKFAC(task_of(folder, folder.about.checkpoints[-1:], single=False), damping=0.01)
    train, queries = loaders(folder)
    attributor.cache(train)
    return Answer(attributor.attribute(train, queries), note="damping 0.01")


def tracin(folder: Folder) -> Answer:
    steps = folder.trained_checkpoints
    weights = torch.full((len(steps),), folder.lr)
    attributor = TracInAttributor(task_of(folder, steps, single=True), weight_list=weights, normalized_grad=False)
    return Answer(attributor.attribute(*loaders(folder, 256)), note=f"projected to 512 (always), {len(steps)} states")


def trak(folder: Folder) -> Answer:
    folder.probabilities()
    steps = folder.trained_checkpoints[-5:]
    model = folder.model()
    loss, size = loss_of(folder, model, single=True), sum(p.numel() for p in model.parameters())

    def probability(params: Any, data: Any) -> Tensor:
        return torch.exp(-loss(params, data))

    attributor = TRAKAttributor(
        task_of(folder, steps, single=True, margin=True),
        correct_probability_func=probability,
        projector_kwargs={"proj_dim": min(_PROJECTED, size), "device": "cpu"},
        regularization=1e-6,
    )
    train, queries = loaders(folder, 256)
    attributor.cache(train)
    return Answer(attributor.attribute(queries), note=f"projected to {_PROJECTED}, {len(steps)} states of the run")


def dvemb(folder: Folder) -> Answer:
    if folder.about.optimizer != "sgd":
        raise UnfitError("knows plain SGD alone")
    task = task_of(folder, folder.about.checkpoints[:1], single=True)
    task._load_checkpoints(0)  # the untrained model, which is trained here
    model = task.get_model().train()
    attributor = DVEmbAttributor(task, proj_dim=_PROJECTED)
    optimizer = torch.optim.SGD(model.parameters(), **folder.about.options)
    per_epoch = -(-len(folder.train) // folder.about.batch_size)
    for t, ids in enumerate(folder.batches):
        batch = [tensor[ids] for tensor in folder.train.tensors]
        attributor.cache_gradients(t // per_epoch, tuple(batch), ids, folder.lr)
        optimizer.zero_grad()
        folder.loss(model, batch).mean().backward()
        optimizer.step()
    attributor.cache()
    return Answer(attributor.attribute(loaders(folder, 256)[1]), note=f"projected to {_PROJECTED}; training counted")


METHODS: dict[str, Callable[[Folder], Answer]] = {
    "dattri-if-cg": conjugate_gradients,
    "dattri-ekfac": ekfac,
    "dattri-tracin": tracin,
    "dattri-trak": trak,
    "dattri-dvemb": dvemb,
}

if __name__ == "__main__":
    work(METHODS)
