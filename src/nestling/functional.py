"""The formulas of nestling, on torch tensors: pure functions, each with its source. Levels go coarse to fine."""

from nestling.data.distortions import turbulence
from nestling.evaluate.retrieval import recall_at_k
from nestling.objectives.calibration import expected_calibration_error
from nestling.objectives.functional import aggregate, combine_levels, least_expected_distance, marginal_cross_entropy
from nestling.objectives.instances import instance_loss, instance_loss_within, proxy_loss

__all__ = [
    "aggregate",
    "combine_levels",
    "expected_calibration_error",
    "instance_loss",
    "instance_loss_within",
    "least_expected_distance",
    "marginal_cross_entropy",
    "proxy_loss",
    "recall_at_k",
    "turbulence",
]
