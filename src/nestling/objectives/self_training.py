"""Labels that the network gives itself, inside the classes that are known: beyond the paper of nested learning.

The parent narrows the guess to a few children, so that a row known only coarsely teaches the finer levels more than its
summed probability. Mean Teacher (Tarvainen and Valpola 2017) makes the guess, by a slow copy of the network on another
view of the row; FixMatch (Sohn et al. 2020) takes the guesses alone that are certain, as hard labels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nestling.objectives.functional import within_known
from nestling.objectives.reducers import Reducer
from nestling.objectives.slow_copy import WithSlowCopy, as_precise

if TYPE_CHECKING:
    from nestling.data.batch import Batch
    from nestling.models.model import Model, Outputs


class SelfTraining(WithSlowCopy):
    """Every head learns what the slow copy answers for the other view of a row, given what is known of the row.

    A row counts at the levels at which it has no label. The slow copy answers by all of its levels (Equation 2, or the
    sums of a flat softmax), not calibrated.

    Parameters
    ----------
    model: the network.
    until: the last output that there is in this stage; None for all.
    momentum: of the slow copy.
    certain: the least probability of a guess that is learned, as a hard label; None learns all, with their doubts.

    Raises UsageError for a momentum outside of [0, 1].
    """

    def __init__(
        self,
        model: Model,
        until: str | None = None,
        momentum: float = 0.99,
        certain: float | None = None,
        reducer: Reducer | None = None,
    ) -> None:
        super().__init__("self-training", model, momentum, reducer, warms=True)
        self.until, self.certain, self.taxonomy = until, certain, model.taxonomy

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        view = batch.inputs if batch.other is None else batch.other
        slow = cast("Model", self.slow)
        with torch.no_grad():
            with as_precise(outputs.embedding):
                seen = slow(view, until=self.until)
            guesses = slow.answers(seen, reject=False).combined
        total = torch.zeros_like(batch.labels[:, 0], dtype=torch.float32)
        counted = torch.zeros_like(total)
        for level in outputs.logits:
            guess = within_known(guesses[level], batch.labels, self.taxonomy, level)
            counts = (batch.at(level) < 0).float()
            counted = torch.maximum(counted, counts)
            if self.certain is not None:
                likeliest = guess.max(1)
                guess = F.one_hot(likeliest.indices, guess.shape[1]).float()
                counts = counts * (likeliest.values >= self.certain)
            for scores in outputs.learners(level):
                total = total - counts * (guess * scores.log_softmax(1)).sum(1)
        return total, counted
