"""What the recorded run says of its examples by itself."""

import torch
from torch import Tensor

from hydragrad.retraining.measuring import queries_of
from hydragrad.run import Run
from hydragrad.shapes import Float


def mean_training_losses(run: Run) -> Float[Tensor, " N"]:
    """Each training example's loss averaged over the run's checkpoints, the untrained one left out.

    A signal of wrong labels that a recording gives for free: the network learns them last.
    """
    queries = queries_of(run, run.problem.data)
    stored = [step for step in run.trajectory.checkpoints if step > 0]
    return torch.stack([queries.values(run.trajectory.state(step)) for step in stored]).mean(0).cpu()
