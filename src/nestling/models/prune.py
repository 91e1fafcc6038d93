"""Filters that are really removed: the layer, its classifier and the next layer become narrower, not masked."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from nestling.errors import UsageError
from nestling.models.convnet import Block
from nestling.models.weights import reshape

if TYPE_CHECKING:
    from nestling.models.layerwise import LayerwiseModel


def filter_scores(activations: Tensor, gradients: Tensor) -> Tensor:
    """The first-order Taylor criterion of Molchanov et al. 2016 for every filter of a layer, summed over rows.

    Parameters
    ----------
    activations, gradients: (b, channels, h, w), the layer's map and the loss's gradient with respect to it.

    Returns
    -------
    (channels,): sum over the rows of |mean over positions of activation x gradient|, their Eq. 8, which estimates how
    much the loss changes when the filter is removed.
    """
    return (activations.float() * gradients.float()).mean((2, 3)).abs().sum(0)


@torch.no_grad()
def narrow(model: LayerwiseModel, block: int, kept: Tensor) -> None:
    """Leave the filters ``kept`` (numbers, int64) of a block, in it and in all that reads its map.

    Raises UsageError where the block is no plain convolution, or no filter is left.
    """
    layer = model.blocks[block]
    if not isinstance(layer, Block):
        raise UsageError(f"layer {block + 1} is no single convolution: only networks of those can be pruned")
    if len(kept) == 0:
        raise UsageError(f"no filter of layer {block + 1} would be left: keep at least one")
    kept = kept.to(layer.conv.weight.device)
    select(layer.conv, {"weight": (0, kept), "bias": (0, kept)})
    select_norm(layer.norm, kept)
    name = f"layer-{block + 1}"
    if name in model.auxiliary:
        head = model.head(name)
        if len(head.hidden):
            select(head.hidden[0].conv, {"weight": (1, kept)})  # type: ignore[arg-type]
        else:
            select_norm(head.norm, kept)
            select(head.linear, {"weight": (1, copies(kept, head.cells))})
        if head.matching is not None:
            # As many channels as the map has.
            for dimension in (0, 1):
                select(head.matching.conv, {"weight": (dimension, kept)})
    if block + 1 < len(model.blocks):
        after = model.blocks[block + 1]
        if not isinstance(after, Block):
            raise UsageError(f"layer {block + 2} is no single convolution: only networks of those can be pruned")
        select(after.conv, {"weight": (1, copies(kept, after.copies))})


def copies(channels: Tensor, count: int) -> Tensor:
    """The places of these channels where each stands ``count`` times in a row: after space-to-depth, or flattening."""
    return (channels[:, None] * count + torch.arange(count, device=channels.device)).flatten()


def select_norm(norm: nn.Module, kept: Tensor) -> None:
    """The same channels of a batch norm; nothing where there is none."""
    if isinstance(norm, nn.BatchNorm2d):
        select(norm, dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (0, kept)))


def select(module: nn.Module, chosen: dict[str, tuple[int, Tensor]]) -> None:
    """Keep of each named tensor, along its dimension, the numbers given."""
    before = {name: t for name, t in module.state_dict().items() if name in chosen}
    after = {name: t.index_select(chosen[name][0], chosen[name][1].to(t.device)) for name, t in before.items()}
    reshape(module, {name: t.shape for name, t in after.items()})
    own = module.state_dict()
    for name, tensor in after.items():
        if tensor.device.type != "meta":
            own[name].copy_(tensor)
