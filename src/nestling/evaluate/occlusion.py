"""What features respond to: how far they turn when a part of the picture is covered."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.errors import UsageError

Embed = Callable[[Tensor], Tensor]
"""Pictures (n, c, h, w) to features (n, d)."""


def turned(features: Tensor, altered: Tensor) -> Tensor:
    """1 - cosine between rows of (n, d), in [0, 2]."""
    return 1 - F.cosine_similarity(features.float(), altered.float(), dim=1)


def covered(images: Tensor, mask: Tensor, fill: int) -> Tensor:
    """Pictures (n, c, h, w) with the value ``fill`` in every channel where ``mask``, bool (n, h, w) or (h, w), says."""
    return images.masked_fill(mask.expand(len(images), *images.shape[2:])[:, None], fill)


def response(embed: Embed, images: Tensor, mask: Tensor, fill: int) -> Tensor:
    """(n,): how far the features of each picture turn when its pixels under ``mask`` are covered."""
    return turned(embed(images), embed(covered(images, mask, fill)))


def occlusion_maps(embed: Embed, images: Tensor, side: int, stride: int, fill: int) -> Tensor:
    """(n, h, w): for each pixel the mean response over the squares of ``side`` that cover it, 0 where none does.

    Squares lie ``stride`` apart, as far as they fit. ``UsageError`` for a square that does not.
    """
    height, width = images.shape[2:]
    if not 0 < side <= min(height, width) or stride < 1:
        raise UsageError(f"expected a square of 1 to {min(height, width)} pixels and a stride of at least 1, "
                         f"got {side} and {stride}")  # fmt: skip
    plain = embed(images)
    total = torch.zeros(len(images), height, width)
    count = torch.zeros(height, width)
    for top in range(0, height - side + 1, stride):
        for left in range(0, width - side + 1, stride):
            mask = torch.zeros(height, width, dtype=torch.bool)
            mask[top : top + side, left : left + side] = True
            found = turned(plain, embed(covered(images, mask, fill))).cpu()
            total[:, mask] += found[:, None]
            count += mask
    return total / count.clamp_min(1)
