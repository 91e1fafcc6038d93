"""Momentum contrast in place of the rows W^I: MoCo-v2 (He et al. 2020, Chen et al. 2020), for the coarse labels paper.

Each picture is told from those of the last batches, by the features that a slow copy of the network has of them: the
instance classification of Section 4.3 of *Weakly Supervised Representation Learning with Coarse Labels*.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling import collective
from nestling.errors import UsageError
from nestling.objectives.instance_terms import features_of
from nestling.objectives.instances import info_nce
from nestling.objectives.reducers import Reducer
from nestling.objectives.slow_copy import WithSlowCopy, as_precise

if TYPE_CHECKING:
    from nestling.data.batch import Batch
    from nestling.models.model import Outputs


class MomentumContrast(WithSlowCopy):
    """InfoNCE of a picture's features with those of its other view, against a queue of other pictures' features.

    Features are those of a cosine softmax, f / |f| / T: the temperature is the model's. The queue is a buffer. The slow
    copy is in evaluation mode, so that no key tells which batch it was in, and none depends on which process made it:
    MoCo shuffles batches between GPUs for the former.

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
        super().__init__("instance", model, momentum, reducer)
        if queue < 1:
            raise UsageError(f"queue must be at least 1, got {queue}")
        self.output = output
        self.queue: Tensor
        self.place: Tensor
        self.register_buffer("queue", F.normalize(torch.randn(queue, dimension), dim=1))
        self.register_buffer("place", torch.zeros((), dtype=torch.int64))
        self.fresh: Tensor | None = None

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        queries = features_of(outputs, self.output)
        if batch.other is None:
            raise UsageError("momentum contrast compares two views of a row, and the batch has one: set Stage.pairs")
        with torch.no_grad(), as_precise(outputs.embedding):
            keys = features_of(self.slow(batch.other), self.output)
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
