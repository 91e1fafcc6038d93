"""A linear model of a text's words, beside a network: it learns from few texts what convolutions learn from many.

After Cheng et al. 2016, *Wide & Deep Learning for Recommender Systems*, where the scores of both are added; but each
learns as if it stood alone, and by the rule that suits it: of a sum the part that learns faster leaves nothing to the
other.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nestling import collective
from nestling.data.text import BUCKETS

WIDEST = 64
"""Numbers that are learned of each word: as many as there are classes, and no more than these."""
SCALE = 300.0
"""Of the scores: how far one step of the optimiser moves them. Half and 1.7 times are level on validation rows."""
NETWORK = 0.1
"""What the network's own scores count in the sum. Held-out training rows: 0.05 to 0.2 are level, 1 is worse."""
HASHED = 1024
"""Numbers of a text's words that search compares."""
SHARE = 0.5
"""Length of the network's features beside them. On held-out training rows of newsgroups20 0.3 to 0.7 are level."""
MIX, MASK = 0x9E3779B97F4A7C15 - (1 << 64), (1 << 63) - 1
"""Multiplicative hashing (Knuth 1973), in int64: high bits depend on all bits of a number, and twice done all do."""


class AlongGradient(nn.Parameter):
    """A parameter that ``engine.optim`` moves along its gradient itself, without Adam's division."""


class Reading(NamedTuple):
    """Words (b, length) int64 of texts, sorted, and their weights (b, length): a word weighs at its first place."""

    words: Tensor
    weights: Tensor


class Words(nn.Module):
    """Encoded texts (b, 2, 1, length) to the TF-IDF weights of their words, by the texts that training has shown it."""

    def __init__(self) -> None:
        super().__init__()
        self.documents: Tensor
        """(BUCKETS,) int64: of the texts drawn for training, how many hold a word; at 0 how many there were."""
        self.register_buffer("documents", torch.zeros(BUCKETS, dtype=torch.int64))

    @property
    def counts(self) -> bool:
        """Whether texts are counted now."""
        return self.training

    @torch.no_grad()
    def read(self, texts: Tensor) -> Reading:
        """The words of texts and their weights; in training the texts are counted before."""
        # Repeated words are negative, and there for the convolutions.
        words = texts[:, 0, 0].long().clamp_min(0).sort(1).values
        first = is_first(words)
        if self.counts:
            self.count(words, first)
        return Reading(words, self.weights(words, first))

    def count(self, words: Tensor, first: Tensor) -> None:
        """Document frequencies, from the batches that are trained on, as batch norm has its means.

        As there, a batch that is taken again, where memory ran out, counts again.
        """
        found = torch.zeros_like(self.documents).index_add_(0, words.flatten(), first.flatten().long())
        found[0] = len(words)
        self.documents += collective.all_sum(found)

    def weights(self, words: Tensor, first: Tensor) -> Tensor:
        """TF-IDF (b, length) of sorted words, each at its first place: the squares of a text's weights sum to 1.

        As scikit-learn's ``TfidfVectorizer(sublinear_tf=True)``: (1 + ln tf) (1 + ln((1 + n) / (1 + df))), and a word
        that no training text holds does not count.
        """
        number = first.cumsum(1) - 1
        counts = torch.zeros(words.shape, device=words.device).scatter_add_(1, number, torch.ones_like(first).float())
        documents = self.documents[words]
        rarity = 1 + ((1 + self.documents[0]) / (1 + documents)).log()
        counted = first & (words > 0) & (documents > 0)
        return F.normalize((1 + counts.gather(1, number).log()) * rarity * counted, dim=1)


class LinearWords(Words):
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
        self.table = AlongGradient(torch.zeros(BUCKETS, min(total, WIDEST)))
        self.directions: Tensor
        """(classes, numbers), of length 1."""
        directions = nn.init.orthogonal_(torch.empty(total, min(total, WIDEST)))
        self.register_buffer("directions", F.normalize(directions, dim=1))

    @property
    def counts(self) -> bool:
        return self.training and self.table.requires_grad

    def forward(self, texts: Tensor) -> dict[str, Tensor]:
        return self.score(self.read(texts))

    def score(self, read: Reading) -> dict[str, Tensor]:
        """(b, width) of every output, fp32."""
        words, weights = read
        with nullcontext() if words.is_meta else torch.autocast(words.device.type, enabled=False):
            found = F.embedding_bag(words, self.table, per_sample_weights=weights, mode="sum")
            scores = SCALE * found @ self.directions.T
        return dict(zip(self.widths, scores.split(list(self.widths.values()), 1), strict=True))


def beside(pooled: Tensor, read: Reading) -> Tensor:
    """What search compares of texts (b, d + ``HASHED``), fp32: the pooled map, ``SHARE`` long, and the words."""
    return torch.cat([SHARE * F.normalize(pooled.float(), dim=1), hashed(read)], 1)


def hashed(read: Reading) -> Tensor:
    """TF-IDF weights in ``HASHED`` numbers (b, ``HASHED``), of length 1: each word has a place and a sign.

    The scalar product of two texts is that of their TF-IDF, but for words that share a place, which cancel on average
    (feature hashing, Weinberger et al. 2009).
    """
    words, weights = read
    mixed = words * MIX & MASK
    mixed = (mixed ^ mixed >> 29) * MIX & MASK
    place, sign = (mixed >> 32) % HASHED, 1 - 2 * (mixed >> 60 & 1)
    found = torch.zeros(len(words), HASHED, device=words.device).scatter_add_(1, place, weights * sign)
    return F.normalize(found, dim=1)


def is_first(words: Tensor) -> Tensor:
    """bool (b, length): where a word of sorted words (b, length) stands for the first time."""
    return torch.cat([torch.ones_like(words[:, :1], dtype=torch.bool), words[:, 1:] != words[:, :-1]], 1)
