"""A linear model of a text's words, beside a network: it learns from few texts what convolutions learn from many.

After Cheng et al. 2016, *Wide & Deep Learning for Recommender Systems*: the scores of both are added, and both are
trained together, each by the rule that suits it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling.data.text import BUCKETS

WIDEST = 64
"""Numbers that are learned of each word: as many as there are classes, and no more than these."""
SCALE = 300.0
"""Of the scores: how far one step of the optimiser moves them. Twice as much is unstable at the highest rate."""
NETWORK = 0.1
"""What the network's own scores count in the sum. At 1 it fits a few texts by their rare words before the linear model
has learned from them, and leaves nothing to learn."""


class LinearWords(nn.Module):
    """Encoded texts (b, 2, 1, length) to scores (b, width) of every output: linear in TF-IDF, and 0 at first.

    Every class has a fixed direction in the space of what is learned of a word. They are at right angles while there
    are no more classes than ``WIDEST``, of all outputs together, so that this is one softmax regression per output;
    beyond that they share what there is.

    Parameters
    ----------
    widths: the number of classes of each output.
    """

    def __init__(self, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.widths = dict(widths)
        total = sum(widths.values())
        self.table = nn.Embedding(BUCKETS, min(total, WIDEST))
        nn.init.zeros_(self.table.weight)
        follow_gradient(self.table)
        self.directions: Tensor
        """(classes, numbers), of length 1."""
        directions = nn.init.orthogonal_(torch.empty(total, min(total, WIDEST)))
        self.register_buffer("directions", F.normalize(directions, dim=1))
        self.documents: Tensor
        """(BUCKETS,): of the texts trained on, how many hold a word; at 0 how many there were."""
        self.register_buffer("documents", torch.zeros(BUCKETS))

    def forward(self, texts: Tensor) -> dict[str, Tensor]:
        words = texts[:, 0, 0].long().sort(1).values
        first = torch.ones_like(words, dtype=torch.bool)
        first[:, 1:] = words[:, 1:] != words[:, :-1]
        if self.training and self.table.weight.requires_grad:
            self.count(words, first)
        with torch.autocast(texts.device.type, enabled=False):
            weights = self.weights(words, first)
            found = F.embedding_bag(words, self.table.weight, per_sample_weights=weights, mode="sum")
            scores = SCALE * found @ self.directions.T
        return dict(zip(self.widths, scores.split(list(self.widths.values()), 1), strict=True))

    @torch.no_grad()
    def count(self, words: Tensor, first: Tensor) -> None:
        """Document frequencies, from the batches that are trained on, as batch norm has its means."""
        there = (first & (words > 0)).float()
        self.documents.index_add_(0, words.flatten(), there.flatten())
        self.documents[0] += len(words)

    @torch.no_grad()
    def weights(self, words: Tensor, first: Tensor) -> Tensor:
        """TF-IDF (b, length) of sorted words, each at its first place: the squares of a text's weights sum to 1.

        As scikit-learn's ``TfidfVectorizer(sublinear_tf=True)``: (1 + ln tf) (1 + ln((1 + n) / (1 + df))). A text
        that is repeated to fill the length counts its rarest word as one.
        """
        number = first.cumsum(1) - 1
        counts = torch.zeros(words.shape, device=words.device).scatter_add_(1, number, torch.ones_like(first).float())
        counts = counts / counts.masked_fill(counts == 0, float("inf")).amin(1, keepdim=True)
        rarity = 1 + ((1 + self.documents[0]) / (1 + self.documents[words])).log()
        return F.normalize((1 + counts.gather(1, number).log()) * rarity * (first & (words > 0)), dim=1)


def follow_gradient(table: nn.Embedding) -> None:
    """Mark a table of words: ``engine.optim`` moves it along its gradient, without Adam's division."""
    table.weight.follows_gradient = True  # type: ignore[attr-defined]
