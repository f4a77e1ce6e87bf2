"""How well scores predict what really happened, and signals the wrong labels."""

import torch
from torch import Tensor

from comparison.tasks import Spec
from comparison.truth import FRACTIONS
from hydragrad.report.measures import average_ranks, mean_spearman, precision_recall


def predictions(scores: Tensor, truth: dict[str, Tensor], spec: Spec) -> dict[str, float]:
    """Leave-one-out Spearman and LDS at each fraction, each the mean over queries."""
    ids, changes, weights = truth["ids"], truth["changes"], truth["weights"]
    found = {"loo": mean_spearman(scores[ids], changes[: len(ids)])}
    predicted = (1 - weights.double()) @ scores  # to first order, what is removed adds up
    for place, fraction in enumerate(FRACTIONS):
        first = len(ids) + place * spec.subsets
        part = slice(first, first + spec.subsets)
        found[f"lds_{100 * fraction:g}"] = mean_spearman(predicted[part], changes[part])
    return found


def mislabels(signal: Tensor, flipped: Tensor) -> dict[str, float]:
    """AUROC, and the part of the wrong labels that is among the first tenth."""
    first = max(1, round(0.1 * len(signal)))
    return {"auroc": auroc(signal, flipped), "recall": precision_recall(signal, flipped, first).recall}


def auroc(signal: Tensor, flipped: Tensor) -> float:
    """The probability that a wrong label's signal is above a right one's; ties count half."""
    wrong = torch.zeros(len(signal), dtype=torch.bool)
    wrong[flipped] = True
    n, m = int(wrong.sum()), int((~wrong).sum())
    return float((average_ranks(signal)[wrong].sum() - n * (n + 1) / 2) / (n * m))
