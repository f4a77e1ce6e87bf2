"""Buffers that changed after the last step: no step leads to the model as it was when the recording ended."""

from hydragrad.errors import UnsupportedError, message
from hydragrad.trajectory.store import Trajectory


def moved_on(trajectory: Trajectory) -> str:
    """In words that buffers changed after the last step; empty if they did not."""
    if not trajectory.moved:
        return ""
    last, left = len(trajectory), len(trajectory.trailing)
    return message(
        "the model's buffers changed after the last optimizer step",
        expected="a run that ends with a step, so that replay leads to the trained model",
        got=f"{left} {'batch' if left == 1 else 'batches'} after step {last - 1}, the last one; replay ends before",
        cause="an incomplete last group of accumulated batches, a loop left after a forward pass, or running "
        "statistics (BatchNorm) recalibrated, all in training mode",
        remedy="take the optimizer step for the last group or drop its batches (drop_last=True, or call no model on "
        "them), recalibrate after the recorded block, and record again; or ask about the model as that step left it: "
        f"step={last} (replay: until={last})",
    )


def refuse_moved_on(trajectory: Trajectory) -> None:
    """Refuse a question about the end of a run whose model moved on from its last step."""
    if refusal := moved_on(trajectory):
        raise UnsupportedError(refusal)
