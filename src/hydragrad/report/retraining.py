"""What really happens without an example, and what the recorded run says of its examples by itself."""

from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from hydragrad.hypergradient.queries import Queries
from hydragrad.run import Run
from hydragrad.shapes import Float, Int
from hydragrad.trajectory.state import State


def losses_at(run: Run, state: State, data: Any) -> Float[Tensor, " M"]:
    """The loss of each example of ``data`` with the parameters of ``state``, in evaluation mode, on the CPU."""
    return _queries(run, data).values(state).cpu()


def leave_one_out(run: Run, ids: Int[Tensor, " n"], data: Any, *, progress: bool = False) -> Float[Tensor, "n M"]:
    """Measured change m_j(without example i) - m_j(as trained), each row by really training again: n replays."""
    queries = _queries(run, data)
    before = queries.values(run.trajectory.state(run.num_steps)).double()
    changes = []
    for i in tqdm(ids.tolist(), desc="retraining", unit="run", delay=2, disable=not progress):
        weights = torch.ones(run.num_examples)
        weights[i] = 0.0
        changes.append(queries.values(run.replay(weights=weights)).double() - before)
    return torch.stack(changes).cpu()


def mean_training_losses(run: Run) -> Float[Tensor, " N"]:
    """Each training example's loss averaged over the run's checkpoints, the untrained one left out.

    A signal of wrong labels that a recording gives for free: the network learns them last.
    """
    queries = _queries(run, run.problem.data)
    stored = [step for step in run.trajectory.checkpoints if step > 0]
    return torch.stack([queries.values(run.trajectory.state(step)) for step in stored]).mean(0).cpu()


def _queries(run: Run, data: Any) -> Queries:
    manifest = run.trajectory.manifest
    device = next((parameter.device for parameter in run.problem.model.parameters()), torch.device("cpu"))
    return Queries(run.problem, data, tuple(manifest.params), None, device, manifest.collate["mode"])
