"""Measures against brute force, and on a truth that is known to be linear."""

from dataclasses import replace

import pytest
import torch

from comparison.measures import auroc, mislabels, predictions
from comparison.tasks import TASKS
from comparison.truth import FRACTIONS, weights_of

SPEC = replace(TASKS["digits-sgd"], removed=12, subsets=9)
N, M = 60, 4


def test_auroc_is_the_part_of_pairs_in_the_right_order():
    signal = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0, 5.0, 2.0])
    flipped = torch.tensor([0, 2])
    pairs = [(float(signal[i]), float(signal[j])) for i in flipped for j in range(7) if j not in (0, 2)]
    right = sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in pairs) / len(pairs)
    assert auroc(signal, flipped) == pytest.approx(right)


def test_a_perfect_signal_finds_all():
    flipped = torch.tensor([3, 10, 40, 41, 59, 7])
    signal = torch.zeros(N)
    signal[flipped] = 1.0
    assert mislabels(signal, flipped) == {"auroc": 1.0, "recall": 1.0}
    assert mislabels(-signal, flipped)["auroc"] == 0.0


def truth(changes_of) -> dict[str, torch.Tensor]:
    ids, weights = weights_of(SPEC, N, seed=1)
    return {"ids": ids, "weights": weights, "changes": changes_of(1 - weights.double())}


def test_scores_that_add_up_predict_perfectly_and_their_negatives_oppositely():
    scores = torch.randn(N, M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    real = truth(lambda removed: removed @ scores)
    found = predictions(scores, real, SPEC)
    assert set(found) == {"loo", "lds_1", "lds_10", "lds_30"}
    assert all(value == pytest.approx(1.0) for value in found.values())
    assert all(value == pytest.approx(-1.0) for value in predictions(-scores, real, SPEC).values())


def test_each_measure_looks_at_its_own_retrainings():
    scores = torch.randn(N, M, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for turned, name in enumerate(("loo", "lds_1", "lds_10", "lds_30")):
        real = truth(lambda removed: removed @ scores)
        starts = [0, SPEC.removed, SPEC.removed + SPEC.subsets, SPEC.removed + 2 * SPEC.subsets, None]
        real["changes"][starts[turned] : starts[turned + 1]] *= -1
        found = predictions(scores, real, SPEC)
        assert {key for key, value in found.items() if value == pytest.approx(-1.0)} == {name}


def test_weights_remove_what_they_say():
    ids, weights = weights_of(SPEC, N, seed=1)
    assert len(weights) == SPEC.removed + len(FRACTIONS) * SPEC.subsets
    for row, i in enumerate(ids.tolist()):
        assert (weights[row] == 0).nonzero().flatten().tolist() == [i]
    for place, fraction in enumerate(FRACTIONS):
        rows = weights[SPEC.removed + place * SPEC.subsets :][: SPEC.subsets]
        assert ((rows == 0).sum(1) == max(1, round(fraction * N))).all()
    assert torch.equal(weights, weights_of(SPEC, N, seed=1)[1])
    assert not torch.equal(weights, weights_of(SPEC, N, seed=2)[1])
