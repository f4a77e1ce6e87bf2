"""How many losses an example has: the axis of scores that are kept per token."""

import torch

from hydragrad.errors import MismatchError, message
from hydragrad.hypergradient.sweeping import Sweep
from hydragrad.step.objective import Point


def longest(sweep: Sweep) -> int:
    """L, the most losses that an example has in any batch before step ``stop``: every batch's form is looked at.

    Raises MismatchError where an example has one loss only.
    """
    objective, state, found = sweep.objective, sweep.end(), set[int]()
    params = tuple(state.params[name] for name in objective.names)
    carried = tuple(state.buffers[name] for name in objective.carried)
    known = {*objective.names, *objective.carried}
    rest = {name: x for name, x in {**state.params, **state.buffers}.items() if name not in known}
    nothing = params[0].new_empty(0)
    with objective.differentiable(), torch.no_grad():
        for record in sweep.run.steps[: sweep.stop]:
            objective.follow_modes(record.modes)
            for ids, batch in sweep.replayer.batches(record, compare=False):
                shape = objective.loss_shape(Point(params, rest, batch, nothing, nothing, carried), len(ids))
                if len(shape) == 1:
                    raise MismatchError(
                        message(
                            "there are no tokens to tell apart",
                            expected=f"losses of shape [{len(ids)}, L] from loss(model, batch)",
                            got=f"shape {list(shape)} at step {record.index}",
                            cause="the loss was summed or averaged over the tokens of each example",
                            remedy="return the losses of the tokens, or leave out tokens=True",
                        )
                    )
                found.add(shape[1])
    return max(found)
