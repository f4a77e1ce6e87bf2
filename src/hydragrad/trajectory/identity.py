"""What tells one recorded run from another."""

from collections.abc import Sequence

import torch

from hydragrad.files import sha256
from hydragrad.trajectory.state import StepRecord


def identity(steps: Sequence[StepRecord]) -> str:
    """A hash of a run's steps: the examples of each, and their gradients."""
    gradients = [record.fingerprint.to("cpu", torch.float64) for record in steps if record.fingerprint is not None]
    ids = [ids for record in steps for ids in (torch.tensor([len(record.batches)]), *record.batches)]
    return sha256(b"".join([torch.cat(part).cpu().numpy().tobytes() for part in (gradients, ids) if part]))
