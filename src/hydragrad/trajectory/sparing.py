"""Which steps are looked at closely while a run is recorded: a look at each costs a small model 3 % of its training.

What is left out is not lost: it goes into the gradients after it and into the next recorded state, which are compared.
A refusal may then name a step up to fifteen later.
"""

from collections.abc import Sequence
from itertools import takewhile

from hydragrad.trajectory.state import StepRecord

ALWAYS, _EVERY = 100, 16


def fingerprinted(step: int) -> bool:
    """Whether this step's gradient is: of the first hundred each, then of every sixteenth."""
    return step < ALWAYS or step % _EVERY == 0


def digested(step: int, epoch: int) -> bool:
    """Whether the content of a batch is that was handed out for this step: in the first pass always."""
    return epoch == 0 or fingerprinted(step)


def suspects(steps: Sequence[StepRecord], step: int) -> range:
    """The steps a difference may come from that shows in the gradient of ``step``: it, and those without one before."""
    before = takewhile(lambda t: steps[t].fingerprint is None, range(step - 1, -1, -1))
    return range(step - len(list(before)), step + 1)
