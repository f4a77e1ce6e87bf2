"""kronfluence 1.0.1: EK-FAC of linear and convolutional layers. It returns [queries, examples]."""

# pyright: reportMissingImports=false

import tempfile
from functools import partial
from typing import Any

import torch
from kronfluence.analyzer import Analyzer, prepare_model
from kronfluence.arguments import FactorArguments, ScoreArguments
from kronfluence.task import Task
from torch import Tensor, nn

from comparison.exchange import Answer, Folder, work


class _Losses(Task):
    """Training loss and measurement are the same sum of losses; labels are drawn from the model's own prediction."""

    def __init__(self, folder: Folder) -> None:
        super().__init__()
        self.folder = folder

    def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
        inputs, targets = batch
        outputs = model(inputs)
        if sample:
            flat = outputs.detach().flatten(0, -2).softmax(-1)
            targets = torch.multinomial(flat, 1).flatten().view(targets.shape)
        return self.folder.loss(lambda _: outputs, (inputs, targets)).sum()

    def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
        return self.compute_train_loss(batch, model)


def ekfac(folder: Folder, damping: float | None, note: str) -> Answer:
    task = _Losses(folder)
    model = prepare_model(folder.model(), task)
    damped = ScoreArguments(damping_factor=damping)
    with tempfile.TemporaryDirectory() as scratch:
        analyzer = Analyzer("run", model, task, cpu=True, output_dir=scratch, disable_tqdm=True)
        analyzer.fit_all_factors(
            "ekfac",
            dataset=folder.train,
            factor_args=FactorArguments(strategy="ekfac"),
            per_device_batch_size=256,
            overwrite_output_dir=True,
        )
        analyzer.compute_pairwise_scores(
            "pairs",
            factors_name="ekfac",
            score_args=damped,
            query_dataset=folder.queries,
            train_dataset=folder.train,
            per_device_query_batch_size=64,
            per_device_train_batch_size=256,
        )
        analyzer.compute_self_scores(
            "selves",
            factors_name="ekfac",
            score_args=damped,
            train_dataset=folder.train,
            per_device_train_batch_size=256,
        )
        scores = analyzer.load_pairwise_scores("pairs")
        selves = analyzer.load_self_scores("selves")
    assert scores is not None
    assert selves is not None
    return Answer(scores["all_modules"].T.clone(), selves["all_modules"].clone(), note)


METHODS = {
    "kronfluence-ekfac": partial(ekfac, damping=1e-8, note="its default damping, 1e-8"),
    "kronfluence-ekfac-damped": partial(ekfac, damping=None, note="damping: a tenth of the mean eigenvalue"),
}

if __name__ == "__main__":
    work(METHODS)
