"""traker 0.3.2: TRAK on states of the one run, without an ensemble of trainings."""

# pyright: reportMissingImports=false

import logging
import tempfile

import torch
from torch.utils.data import DataLoader
from trak import TRAKer
from trak.projectors import BasicProjector, ProjectionType

from comparison.exchange import Answer, Folder, work

_PROJECTED = 512


def trak(folder: Folder) -> Answer:
    folder.probabilities()
    folder = folder.single()
    steps, model = folder.trained_checkpoints[-5:], folder.model()
    size = sum(p.numel() for p in model.parameters())
    projected = min(_PROJECTED, size)  # more would make its matrix singular
    projector = BasicProjector(
        grad_dim=size, proj_dim=projected, seed=0, proj_type=ProjectionType.rademacher, device=torch.device("cpu"),
        block_size=100,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        traker = TRAKer(
            model=model, task="image_classification", train_set_size=len(folder.train), save_dir=scratch,
            device="cpu", projector=projector, proj_dim=projected, use_half_precision=False,
            logging_level=logging.ERROR,
        )  # fmt: skip
        for place, step in enumerate(steps):
            traker.load_checkpoint(folder.state(step), model_id=place)
            for batch in DataLoader(folder.train, batch_size=128):
                traker.featurize(batch=batch, num_samples=len(batch[0]))
        traker.finalize_features()
        for place, step in enumerate(steps):
            traker.start_scoring_checkpoint("queries", folder.state(step), place, num_targets=len(folder.queries))
            for batch in DataLoader(folder.queries, batch_size=128):
                traker.score(batch=batch, num_samples=len(batch[0]))
        scores = torch.tensor(traker.finalize_scores("queries").copy())
    return Answer(scores, note=f"projected to {projected}, {len(steps)} states of the run")


METHODS = {"traker-trak": trak}

if __name__ == "__main__":
    work(METHODS)
