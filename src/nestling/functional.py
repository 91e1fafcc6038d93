"""The formulas of nestling, on torch tensors: pure functions, each with its source. Levels go coarse to fine."""

from nestling.data.distortions import turbulence
from nestling.evaluate.retrieval import recall_at_k
from nestling.objectives.calibration import expected_calibration_error
from nestling.objectives.functional import (
    aggregate,
    combine_levels,
    least_expected_distance,
    marginal_cross_entropy,
    similarity_matching,
    within_known,
)
from nestling.objectives.information import mutual_information_bound
from nestling.objectives.instances import instance_loss, instance_loss_within, proxy_loss
from nestling.objectives.robust import (
    adversarial_direction,
    adversarial_step,
    concept_gradient,
    concept_step_size,
    concept_weights_step,
    group_dro_step,
    project_onto_simplex,
    regret_bound,
    slow_start,
    slow_start_factor,
    slow_start_gain,
    tightening,
    worst_concept_accuracy,
)
from nestling.objectives.votes import vote

__all__ = [
    "adversarial_direction",
    "adversarial_step",
    "aggregate",
    "combine_levels",
    "concept_gradient",
    "concept_step_size",
    "concept_weights_step",
    "expected_calibration_error",
    "group_dro_step",
    "instance_loss",
    "instance_loss_within",
    "least_expected_distance",
    "marginal_cross_entropy",
    "mutual_information_bound",
    "project_onto_simplex",
    "proxy_loss",
    "recall_at_k",
    "regret_bound",
    "similarity_matching",
    "slow_start",
    "slow_start_factor",
    "slow_start_gain",
    "tightening",
    "turbulence",
    "vote",
    "within_known",
    "worst_concept_accuracy",
]
