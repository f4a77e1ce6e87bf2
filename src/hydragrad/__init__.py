"""Which training examples made the model do this, and by how much would the answer change without them?"""

__version__ = "0.1.0"

from hydragrad import baselines
from hydragrad.attributing import attribute
from hydragrad.attribution import Attribution
from hydragrad.diagnostics import Diagnostics
from hydragrad.errors import HydragradError, MismatchError, NonFiniteError, StoreError, UnsupportedError
from hydragrad.planning import Plan, plan
from hydragrad.problem import Problem, Reduction
from hydragrad.reporting import write_report
from hydragrad.retraining.planning import RetrainingPlan
from hydragrad.run import Run, load
from hydragrad.suspecting import mislabels
from hydragrad.suspects import Suspect, Suspects
from hydragrad.tasks.task import Task
from hydragrad.tasks.training import train
from hydragrad.trajectory.augmentation import Augmented
from hydragrad.trajectory.recording import Recording, record
from hydragrad.trajectory.state import State
from hydragrad.validating import validate
from hydragrad.validation import Validation
from hydragrad.vectors import Hypergradients, hypergradients
from hydragrad.verification import Verification, verify

__all__ = [
    "Attribution",
    "Augmented",
    "Diagnostics",
    "HydragradError",
    "Hypergradients",
    "MismatchError",
    "NonFiniteError",
    "Plan",
    "Problem",
    "Recording",
    "Reduction",
    "RetrainingPlan",
    "Run",
    "State",
    "StoreError",
    "Suspect",
    "Suspects",
    "Task",
    "UnsupportedError",
    "Validation",
    "Verification",
    "attribute",
    "baselines",
    "hypergradients",
    "load",
    "mislabels",
    "plan",
    "record",
    "train",
    "validate",
    "verify",
    "write_report",
]
