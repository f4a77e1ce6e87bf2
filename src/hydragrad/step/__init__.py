"""The pure training step: optimizer updates and the objective, with their derivatives."""

import hydragrad.step.adaptive as _adaptive  # registers the adaptive optimizers
from hydragrad.step.updates import Linearization, Update, register, supported, update_for

__all__ = ["Linearization", "Update", "register", "supported", "update_for"]

del _adaptive
