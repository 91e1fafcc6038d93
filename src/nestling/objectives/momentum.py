"""Momentum contrast in place of the rows W^I: MoCo-v2 (He et al. 2020, Chen et al. 2020), for the coarse labels paper.

Each picture is told from those of the last batches, by the features that a slow copy of the network has of them: the
instance classification of Section 4.3 of *Weakly Supervised Representation Learning with Coarse Labels*.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling import collective
from nestling.errors import UsageError
from nestling.objectives.instance_terms import features_of
from nestling.objectives.instances import info_nce
from nestling.objectives.reducers import Reducer
from nestling.objectives.terms import Term

if TYPE_CHECKING:
    from nestling.data.batch import Batch
    from nestling.models.model import Outputs


class MomentumContrast(Term):
    """InfoNCE of a picture's features with those of its other view, against a queue of other pictures' features.

    Features are those of a cosine softmax, f / |f| / T: the temperature is the model's. The slow copy and the queue are
    buffers. The copy is in evaluation mode: batch norm takes running statistics, which follow the model's as weights do
    (Cai et al. 2021), so that no key tells which batch it was in, and none depends on which process made it. MoCo
    shuffles batches between GPUs for the former.

    Parameters
    ----------
    output: whose features are compared.
    model: what the slow copy is made of; not held.
    dimension: of the features.
    queue: keys that are kept, of unit norm; random ones at first.
    momentum: of the slow copy, its share that is kept at a step.

    Raises UsageError for a queue without a place, and for a momentum outside of [0, 1].
    """

    def __init__(
        self,
        output: str,
        model: nn.Module,
        dimension: int,
        queue: int = 65_536,
        momentum: float = 0.999,
        reducer: Reducer | None = None,
    ) -> None:
        super().__init__("instance", reducer)
        if queue < 1:
            raise UsageError(f"queue must be at least 1, got {queue}")
        if not 0 <= momentum <= 1:
            raise UsageError(f"momentum must be at least 0 and at most 1, got {momentum}")
        self.output, self.momentum = output, momentum
        self.keys = weights_as_buffers(copy.deepcopy(model)).eval()
        self.queue: Tensor
        self.place: Tensor
        self.register_buffer("queue", F.normalize(torch.randn(queue, dimension), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.fresh: Tensor | None = None

    def train(self, mode: bool = True) -> MomentumContrast:
        super().train(mode)
        self.keys.eval()
        return self

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        queries = features_of(outputs, self.output)
        if batch.other is None:
            raise UsageError("momentum contrast compares two views of a row, and the batch has one: set Stage.pairs")
        # As precise as the model's own pass.
        kind, half = batch.other.device.type, outputs.embedding.dtype
        with torch.no_grad(), torch.autocast(kind, dtype=half, enabled=half in (torch.bfloat16, torch.float16)):
            keys = features_of(self.keys(batch.other), self.output)
        keys = F.normalize(keys, dim=1)
        if self.training:
            self.fresh = keys
        return info_nce(queries, keys, self.queue), torch.ones_like(queries[:, 0])

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """The batch's keys take the places of the oldest: those of all processes, in the order of one."""
        assert self.fresh is not None
        world, count = collective.world_size(), len(self.fresh)
        number = torch.arange(count, device=self.fresh.device) * world + collective.rank()
        keys = collective.gather(self.fresh)[collective.gather(number).argsort()][-len(self.queue) :]
        places = self.place + torch.arange(len(keys), device=keys.device)
        self.queue[places % len(self.queue)] = keys
        self.place.copy_((self.place + len(keys)) % len(self.queue))
        self.fresh = None

    @torch.no_grad()
    def follow(self, model: nn.Module) -> None:
        """Move the slow copy a step towards ``model``: after every step of the optimiser."""
        new, statistics = model.state_dict(), {name for name, _ in model.named_buffers()}
        for name, slow in self.keys.state_dict().items():
            if not slow.is_floating_point():
                slow.copy_(new[name])
                continue
            # Each process has statistics of its own; the slow copy is the same on all of them.
            shared = collective.is_distributed() and name in statistics
            value = collective.all_sum(new[name]) / collective.world_size() if shared else new[name]
            slow.lerp_(value, 1 - self.momentum)


def weights_as_buffers(module: nn.Module) -> nn.Module:
    """The module itself, whose parameters have become buffers: nothing trains them, and checkpoints hold them."""
    for part in module.modules():
        for name, weight in list(part.named_parameters(recurse=False)):
            delattr(part, name)
            part.register_buffer(name, weight.detach().clone())
    return module
