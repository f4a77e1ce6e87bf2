"""A run, its scores, and its test losses from a loop written out."""

import pytest
from torch import Tensor

import hydragrad as hg
from tests.retraining.by_hand import test_losses, trained_again
from tests.validation.proofs import TASK


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> hg.Run:
    return hg.train(TASK, tmp_path_factory.mktemp("validation") / "run", checkpoint_every=4)


@pytest.fixture(scope="module")
def scores(run: hg.Run) -> hg.Attribution:
    return hg.attribute(run, TASK.test, check=False, compile=False, progress=False)


@pytest.fixture(scope="module")
def before(run: hg.Run) -> Tensor:
    return test_losses(TASK, trained_again(TASK, run))
