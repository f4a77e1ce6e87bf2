"""What tells one recorded run from another."""

from collections.abc import Sequence

import torch

from hydragrad.files import sha256
from hydragrad.trajectory.state import StepRecord


def identity(steps: Sequence[StepRecord]) -> str:
    """A hash of the gradients of a run's steps."""
    gradients = torch.stack([record.fingerprint for record in steps]).to("cpu", torch.float64)
    return sha256(gradients.numpy().tobytes())
