"""Modules whose inner maps are computed again on the way back, instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

PARTS = 16
"""Of a batch, whose inner maps are there one after the other."""


def recomputed(module: nn.Module, x: Tensor) -> Tensor:
    """``module(x)``, which keeps ``x`` alone; gradients and running statistics are those of a plain call."""
    result = checkpoint(module, x, use_reentrant=False, context_fn=lambda: (nullcontext(), statistics_kept(module)))
    assert isinstance(result, Tensor)
    return result


@contextmanager
def statistics_kept(module: nn.Module) -> Iterator[None]:
    """Inside the block batch norms normalise as in training, but leave their running statistics as they were."""
    # The second pass over the same rows would count them twice.
    norms = [m for m in module.modules() if isinstance(m, _BatchNorm) and m.training]
    before = [(norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
        norm.num_batches_tracked = None
    try:
        yield
    finally:
        for norm, (momentum, counter) in zip(norms, before, strict=True):
            norm.momentum, norm.num_batches_tracked = momentum, counter


def in_parts(module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``module(x)``, whose inner maps are made again for a sixteenth of the rows at a time on the way back.

    For modules that treat every row by itself, and are not the only reader of ``x``: the others take the one returned,
    whose gradient is added to in place, so that there are never two of them.
    """
    return _InParts.apply(x, module, *module.parameters())  # type: ignore[no-any-return]


def _unseen() -> saved_tensors_hooks:
    """What is saved inside the block is gone a moment later, and no concern of whoever counts what a step keeps."""
    return saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)


class _InParts(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, module: nn.Module, *weights: Tensor) -> tuple[Tensor, Tensor]:
        kind = x.device.type
        context.module, context.weights = module, weights
        halves = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        context.dtype = torch.get_autocast_dtype(kind) if halves else None
        context.save_for_backward(x)
        return x.view_as(x), torch.cat([module(part) for part in x.chunk(PARTS)])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(context: Any, gradient: Tensor, of_features: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        (x,) = context.saved_tensors
        whole = gradient.clone(memory_format=torch.preserve_format) if 0 in gradient.stride() else gradient
        sums = [torch.zeros_like(weight) for weight in context.weights]
        for rows, mine, wanted in zip(x.chunk(PARTS), whole.chunk(PARTS), of_features.chunk(PARTS), strict=True):
            part = rows.detach().requires_grad_()
            halves = torch.autocast(x.device.type, context.dtype) if context.dtype is not None else nullcontext()
            with torch.enable_grad(), halves, _unseen():
                features = context.module(part)
            first, *others = torch.autograd.grad(features, [part, *context.weights], wanted)
            mine += first
            for total, other in zip(sums, others, strict=True):
                total += other
        return whole, None, *sums
