"""A module whose inner maps are computed again on the way back, instead of being kept."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


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
