"""ReLU and averages that need one map less on the way back than torch's: of a layer trained alone, one of four."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class _InPlaceReLU(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        torch.relu_(x)
        context.mark_dirty(x)
        context.save_for_backward(x)
        return x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        (output,) = context.saved_tensors
        if 0 in gradient.stride() or not gradient.is_contiguous(memory_format=torch.channels_last):
            return torch.ops.aten.threshold_backward(gradient, output, 0)
        return torch.ops.aten.threshold_backward.grad_input(gradient, output, 0, grad_input=gradient)


class InPlaceReLU(nn.Module):
    """ReLU that overwrites its input and, on the way back, the gradient of its output.

    For maps that go into convolutions and poolings alone, whose gradients are their own: where the same gradient goes
    to two places, as behind a sum, overwriting it would change the other.
    """

    def forward(self, x: Tensor) -> Tensor:
        return _InPlaceReLU.apply(x) if torch.is_grad_enabled() and x.requires_grad else torch.relu_(x)  # type: ignore[no-any-return]


class _Quadrants(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.shape = x.shape
        return F.adaptive_avg_pool2d(x, 2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        b, c, h, w = context.shape
        each = (gradient * (4 / (h * w)))[:, :, :, None, :, None].expand(b, c, 2, h // 2, 2, w // 2)
        whole = torch.empty(
            (b, c, h, w), dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last
        )
        whole.unflatten(2, (2, -1)).unflatten(4, (2, -1)).copy_(each)
        return whole


def quadrant_averages(x: Tensor) -> Tensor:
    """A of Section 4: maps (b, c, h, w) averaged over the four quadrants, (b, c, 2, 2)."""
    if x.shape[2] % 2 or x.shape[3] % 2 or not (torch.is_grad_enabled() and x.requires_grad):
        return F.adaptive_avg_pool2d(x, 2)
    return _Quadrants.apply(x)  # type: ignore[no-any-return]
