"""A slow copy of a network, whose weights follow those that are trained: what a term compares the network with."""

from __future__ import annotations

import copy
from abc import ABC

import torch
from torch import Tensor, nn

from nestling import collective
from nestling.errors import UsageError
from nestling.objectives.reducers import Reducer
from nestling.objectives.terms import Term


class WithSlowCopy(Term, ABC):
    """Abstract. A term that holds a slow copy of the model, as buffers, in evaluation mode.

    Batch norm in the copy takes running statistics, which follow the model's as weights do (Cai et al. 2021).

    Parameters
    ----------
    name: of the term.
    model: what the slow copy is made of; not held.
    momentum: of the slow copy, its share that is kept at a step.
    warms: the share begins at a tenth and grows to ``momentum``, so that the copy soon forgets the first weights.

    Raises UsageError for a momentum outside of [0, 1].
    """

    def __init__(
        self, name: str, model: nn.Module, momentum: float, reducer: Reducer | None = None, *, warms: bool = False
    ) -> None:
        super().__init__(name, reducer)
        if not 0 <= momentum <= 1:
            raise UsageError(f"momentum must be at least 0 and at most 1, got {momentum}")
        self.slow, self.momentum = weights_as_buffers(copy.deepcopy(model)).eval(), momentum
        self.taken: Tensor | None
        self.register_buffer("taken", torch.zeros(()) if warms else None)

    def train(self, mode: bool = True) -> WithSlowCopy:
        super().train(mode)
        self.slow.eval()
        return self

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Move the slow copy a step towards ``model``: after every step of the optimiser."""
        moves: float | Tensor = 1 - self.momentum
        if self.taken is not None:
            self.taken += 1
            moves = 1 - (self.taken / (9 + self.taken)).clamp(max=self.momentum)
        new, statistics = model.state_dict(), {name for name, _ in model.named_buffers()}
        for name, slow in self.slow.state_dict().items():
            if not slow.is_floating_point():
                slow.copy_(new[name])
                continue
            # Each process has statistics of its own; the slow copy is the same on all of them.
            shared = collective.is_distributed() and name in statistics
            value = collective.all_sum(new[name]) / collective.world_size() if shared else new[name]
            slow.lerp_(value, moves.to(slow.dtype) if isinstance(moves, Tensor) else moves)


def weights_as_buffers(module: nn.Module) -> nn.Module:
    """The module itself, whose parameters have become buffers: nothing trains them, and checkpoints hold them."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, weight.detach().clone())
    return module


def as_precise(like: Tensor) -> torch.autocast:
    """Autocast to the precision that the model's own pass had, whose features ``like`` is."""
    half = like.dtype in (torch.bfloat16, torch.float16)
    return torch.autocast(like.device.type, dtype=like.dtype if half else None, enabled=half)
