"""Real data, really retrained: exact scores order the examples as leaving each one out does."""

from pathlib import Path

import pytest
import torch

import hydragrad as hg
from hydragrad.tasks.digits import digits

REMOVED, QUERIES, SEED = 30, 100, 0


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "momentum", "least"), [(0.02, 0.0, 0.99), (0.1, 0.9, 0.85)])
def test_exact_scores_predict_leave_one_out_on_digits(tmp_path: Path, lr: float, momentum: float, least: float) -> None:
    task = digits(lr=lr, momentum=momentum, test_size=QUERIES)
    run = hg.train(task, tmp_path / "run")
    ids = torch.randperm(len(task.train), generator=torch.Generator().manual_seed(SEED))[:REMOVED]
    scores = hg.attribute(run, task.test, train=ids, compile=False, check=False, progress=False)
    proof = hg.validate(run, scores, task.test, n=REMOVED, progress=False)
    assert proof.correlation.mean >= least
