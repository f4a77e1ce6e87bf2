"""The one home of the tests' tolerances, by dtype, each with its reason.

Every tolerance is relative to the largest entry of what is expected: `max|a - b| <= tol * max|b|`. A score near zero is
a difference of large terms, so its own relative error says nothing; the error that counts is that of the array's scale.
"""

import torch
from torch import Tensor

# Against a dense oracle of the same mathematics in another order of operations. float64: about 1e-16 per operation,
# some 1e4 operations deep, and the curvature of a step amplifies by less than 1e2: 1e-9 leaves room and still sees any
# missing term. float32 (2**29 coarser): 1e-4, and the reference stays in float64.
ORACLE = {torch.float64: 1e-9, torch.float32: 1e-4}

# One optimizer step or a few, elementwise, the same formula in another order: a handful of roundings.
UPDATE = {torch.float64: 1e-12, torch.float32: 2e-6}

# The same computation cut differently (block size, segments, groups): only the order of sums may change.
SAME = {torch.float64: 1e-11, torch.float32: 2e-5}

# Central differences of a float64 replay: truncation h**2 (1e-10 at h = 1e-5) against rounding 1e-16 / h.
FINITE_DIFFERENCE = {torch.float64: 1e-5}

# A one-sided kink's limit, taken a distance 1e-4 * eps away from zero: the relative error is that 1e-4 or less.
LIMIT = {torch.float64: 1e-3}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """`max|actual - expected| / max|expected|`; inf where shapes differ or a value is not finite."""
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    if actual.shape != expected.shape or not bool(actual.isfinite().all()):
        return float("inf")
    if actual.numel() == 0:
        return 0.0
    difference = (actual - expected).abs().max().item()
    return difference if difference == 0 else difference / max(expected.abs().max().item(), 1e-300)


def assert_close(actual: Tensor, expected: Tensor, tolerance: dict[torch.dtype, float]) -> None:
    """Assert the relative error within `tolerance` for the dtype of `actual`."""
    assert actual.shape == expected.shape, f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    error, bound = relative_error(actual, expected), tolerance[actual.dtype]
    assert error <= bound, f"relative error {error:.2e} above {bound:.0e}\nactual {actual}\nexpected {expected}"
