"""The formulas of nestling, on torch tensors: pure functions, each with its source. Levels go coarse to fine."""

from nestling.data.distortions import turbulence
from nestling.objectives.calibration import expected_calibration_error
from nestling.objectives.functional import (
    aggregate,
    combine_levels,
    least_expected_distance,
    marginal_cross_entropy,
    similarity_matching,
)

__all__ = [
    "aggregate",
    "combine_levels",
    "expected_calibration_error",
    "least_expected_distance",
    "marginal_cross_entropy",
    "similarity_matching",
    "turbulence",
]
