"""A network for texts: embeddings of hashed words and pairs of words, then convolutions at several widths.

As after Kim 2014, *Convolutional Neural Networks for Sentence Classification*, and Joulin et al. 2016 for the hashed
n-grams. Its stages give one map each, so that nested learning's decoder stands on it as on any other backbone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nestling.data.text import KINDS

PREFIX = "text:"
HASHES = 2**15
"""Embeddings of each kind, each of which several of the encoding's buckets share; 0 stands for nothing here, too."""
READ = 256
"""Words at the beginning of a text that are convolved; the linear model beside the network has them all."""
KERNELS = (1, 3, 5)
"""Words that the convolutions of a stage see at once, side by side."""


class TextBackbone(nn.Module):
    """Encoded texts (b, 2, 1, length) to maps (b, channels, 1, min(length, READ) / 2^stage).

    Parameters
    ----------
    widths: channels of every stage; embeddings are as wide as the first.
    norm: 'batch' or 'none'.
    dropout: the share of embeddings, and of each pooled map, that is dropped.
    """

    def __init__(self, widths: list[int], norm: str = "batch", dropout: float = 0.0) -> None:
        super().__init__()
        self.channels = tuple(widths)
        self.embeddings = nn.ModuleList(nn.Embedding(HASHES, widths[0], padding_idx=0) for _ in range(KINDS))
        for embedding in self.embeddings:
            nn.init.normal_(embedding.weight, std=widths[0] ** -0.5)  # type: ignore[arg-type]
        self.dropout = nn.Dropout(dropout)
        self.stages = nn.ModuleList()
        previous = widths[0]
        for width in widths:
            self.stages.append(SideBySide(previous, width, norm))
            previous = width
        self.pool = nn.MaxPool2d((1, 2), ceil_mode=True)

    def forward(self, texts: Tensor) -> list[Tensor]:
        folded = fold(texts[..., :READ])
        found = sum(embedding(folded[:, kind, 0]) for kind, embedding in enumerate(self.embeddings))
        assert isinstance(found, Tensor)
        current, maps = found.transpose(1, 2).unsqueeze(2), []
        for number, stage in enumerate(self.stages):
            current = stage(self.dropout(self.pool(current) if number else current))
            maps.append(current)
        return maps


def fold(texts: Tensor) -> Tensor:
    """Buckets, also of repeated words, to 0 to HASHES - 1, int64; 0 alone stays 0."""
    texts = texts.long().abs()
    return torch.where(texts > 0, 1 + (texts - 1) % (HASHES - 1), 0)


class SideBySide(nn.Module):
    """Convolutions over 1, 3 and 5 words, their channels one after the other; then batch norm and ReLU."""

    def __init__(self, inputs: int, outputs: int, norm: str) -> None:
        super().__init__()
        each = [outputs // len(KERNELS)] * (len(KERNELS) - 1)
        sizes = [outputs - sum(each), *each]
        self.convolutions = nn.ModuleList(
            nn.Conv2d(inputs, size, (1, kernel), padding=(0, kernel // 2), bias=norm == "none")
            for size, kernel in zip(sizes, KERNELS, strict=True)
            if size
        )
        self.after = nn.Sequential(*([nn.BatchNorm2d(outputs)] if norm == "batch" else []), nn.ReLU(inplace=True))

    def forward(self, x: Tensor) -> Tensor:
        return self.after(torch.cat([convolution(x) for convolution in self.convolutions], 1))
