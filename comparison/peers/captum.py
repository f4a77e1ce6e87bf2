"""captum 0.9.0. It returns [queries, examples]; positive: proponents."""

# pyright: reportMissingImports=false

from collections.abc import Callable
from typing import Any

import torch
from captum.influence import TracInCP, TracInCPFast
from captum.influence._core.arnoldi_influence_function import ArnoldiInfluenceFunction
from torch import Tensor, nn

from comparison.exchange import Answer, Folder, work


def _load(folder: Folder) -> Callable[[nn.Module, str], float]:
    def load(model: nn.Module, checkpoint: str) -> float:
        model.load_state_dict(folder.state(int(checkpoint)))
        model.eval()
        return folder.lr

    return load


def _answer(folder: Folder, made: Any, note: str) -> Answer:
    found: Tensor = made.influence(tuple(folder.queries.tensors))
    return Answer(found.T, made.self_influence(), note)


def _common(folder: Folder) -> dict[str, Any]:
    """Each loss by itself, as the libraries want it: from outputs and targets, added up over the batch."""
    folder.probabilities()
    return {
        "train_dataset": folder.train,
        "checkpoints_load_func": _load(folder),
        "loss_fn": nn.CrossEntropyLoss(reduction="sum"),
        "batch_size": 128,
    }


def tracin(folder: Folder) -> Answer:
    steps = [str(step) for step in folder.trained_checkpoints]
    made = TracInCP(folder.model(), checkpoints=steps, sample_wise_grads_per_batch=True, **_common(folder))
    return _answer(folder, made, f"{len(steps)} states")


def tracin_fast(folder: Folder) -> Answer:
    steps, model = [str(step) for step in folder.trained_checkpoints], folder.model()
    last = [module for module in model.modules() if isinstance(module, nn.Linear)][-1]
    made = TracInCPFast(model, last, checkpoints=steps, **_common(folder))
    return _answer(folder, made, f"last layer, {len(steps)} states")


def arnoldi(folder: Folder) -> Answer:
    torch.manual_seed(0)
    settings = _common(folder)
    made = ArnoldiInfluenceFunction(
        folder.model(),
        checkpoint=str(folder.about.checkpoints[-1]),
        sample_wise_grads_per_batch=True,
        **settings,
    )
    return _answer(folder, made, "projected to 50 of 200 Arnoldi vectors")


METHODS = {"captum-tracin": tracin, "captum-tracin-fast": tracin_fast, "captum-arnoldi": arnoldi}

if __name__ == "__main__":
    work(METHODS)
