"""One recorded optimizer step as the sweeps see it: from the loss's gradient to the update, linearised."""

from hydragrad.step.clipping import Clipping
from hydragrad.step.optimizer_map import OptimizerMap
from hydragrad.step.updates import Linearization
from hydragrad.trajectory.moments import Moment


def linearized(moment: Moment, optimizer: OptimizerMap) -> tuple[Clipping, list[Linearization | None]]:
    """What became of the step's gradient before the update, and the update of each parameter at what came of it."""
    record, state = moment.record, moment.state
    clipping = Clipping(record.clips, moment.gradient, optimizer.names, record.frozen)
    return clipping, optimizer.linearize(state.params, state.optimizer, clipping.clipped, record.groups)
