"""cleanlab 2.9.0: self-confidence of labels under models that were trained without them, in five folds."""

# pyright: reportMissingImports=false

import torch
from cleanlab.rank import get_label_quality_scores

from comparison.exchange import Answer, Folder, work

_FOLDS = 5
_SEED = 7000
"""Beside the task's: labels are flipped in the order that the task's own seed draws, and folds drawn in the same order
put all wrong labels into the first, where the model that judges them has seen none."""


def self_confidence(folder: Folder) -> Answer:
    folder.probabilities()
    inputs, labels = folder.train.tensors
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SEED + folder.about.seed))
    probabilities = torch.empty(len(labels), folder.about.classes, dtype=torch.float64)
    for fold in order.tensor_split(_FOLDS):
        kept = torch.ones(len(labels), dtype=torch.bool)
        kept[fold] = False
        model = folder.trained_on(kept.nonzero().flatten())
        with torch.no_grad():
            probabilities[fold] = model(inputs[fold]).double().softmax(1)
    quality = get_label_quality_scores(labels.numpy(), probabilities.numpy(), method="self_confidence")
    return Answer(signal=-torch.tensor(quality), note=f"{_FOLDS} trainings on four fifths")


METHODS = {"cleanlab-self-confidence": self_confidence}

if __name__ == "__main__":
    work(METHODS)
