"""Proposition 3.1 of *Shallow Learning for Deep Networks*: a layer that starts where the one before it ended."""

from __future__ import annotations

from torch import Tensor

from nestling.errors import UsageError
from nestling.models.convnet import Block
from nestling.models.layerwise import LayerwiseModel
from nestling.objectives.functional import marginal_cross_entropy
from nestling.taxonomy import Taxonomy


def training_risk(taxonomy: Taxonomy, answers: dict[str, Tensor], labels: Tensor, levels: tuple[str, ...]) -> float:
    """R of Section 3.2: the mean of what the objective minimises, rows known at a coarser level alone included.

    ``answers`` holds the probabilities of one level; ``labels`` are (n, levels).
    """
    ((level, p),) = answers.items()
    known = (labels[:, : levels.index(level) + 1] >= 0).any(1)
    return float(marginal_cross_entropy(p[known].clamp_min(1e-12).log(), labels[known], taxonomy, level).mean())


def start_as_identity(model: LayerwiseModel, block: int) -> None:
    """Proposition 3.1's theta_0: the layer changes nothing, and the classifier is the one before.

    Raises UsageError where the layer is no convolution of as many channels as it gets, without downsampling and norm.
    """
    layer, head, before = model.blocks[block], model.auxiliary[f"layer-{block + 1}"], model.auxiliary[f"layer-{block}"]
    shapes = [[tuple(p.shape) for p in module.parameters()] for module in (head, before)]
    same_level = model.levels_at[block] == model.levels_at[block - 1]
    if not isinstance(layer, Block) or not layer.can_be_identity or shapes[0] != shapes[1] or not same_level:
        raise UsageError(
            f"layer {block + 1} cannot start as the identity: it needs as many channels as layer {block}, no "
            "downsampling, no batch norm and the same level; set init = 'random', or downsample_at = []"
        )
    layer.make_identity()
    head.load_state_dict(before.state_dict())
