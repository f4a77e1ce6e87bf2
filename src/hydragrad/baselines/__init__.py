"""What people use today, on a recorded run, to compare with: influence functions, TracIn, representer points.

Every function takes ``(run, queries)`` and returns an ``Attribution`` with the sign of ``hydragrad.attribute``
(positive: the example helped), and its scale where the method has one. None of them is checked against retraining.
"""

from hydragrad.baselines.gradient_products import gradient_cosine, gradient_dot, tracin, tracin_self
from hydragrad.baselines.influences import influence, relatif, self_influence
from hydragrad.baselines.kronecker import kfac
from hydragrad.baselines.representers import representer

__all__ = [
    "gradient_cosine",
    "gradient_dot",
    "influence",
    "kfac",
    "relatif",
    "representer",
    "self_influence",
    "tracin",
    "tracin_self",
]
