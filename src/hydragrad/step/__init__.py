"""The pure training step: optimizer updates and the objective, with their derivatives."""

import hydragrad.step.adaptive as _adaptive  # registers the adaptive optimizers
from hydragrad.step.known import register, supported, update_for
from hydragrad.step.updates import Linearization, Update, safe_sqrt

__all__ = ["Linearization", "Update", "register", "safe_sqrt", "supported", "update_for"]

del _adaptive
