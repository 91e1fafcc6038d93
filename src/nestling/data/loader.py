"""Which rows make which batch, a pure function of (seed, stage, epoch, step), and those batches on the device."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import lru_cache
from itertools import repeat

import numpy as np
import torch
from torch import Tensor

from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.data.distortions import Distortion
from nestling.data.images import LazyImages
from nestling.data.stream import Ahead
from nestling.data.text import AnyPreprocessing, TextEncoding
from nestling.data.transforms import Augmentation
from nestling.errors import DataError
from nestling.seeds import derive


class RowOrder:
    """The rows of every global batch of a stage.

    Parameters
    ----------
    finest: (n,) finest known level of every row, as ``LabelledData.finest_known`` gives it.
    batch_size: rows per global batch.
    balance: 'rows' (every row once an epoch, in a new order) or 'levels' (the rows of the finest level present make
        half of every batch, those that end at each coarser level share the other half; each kind is an endless shuffled
        stream).
    steps_per_epoch: by default as many as one pass over all rows takes.
    key: what the order depends on, a ``seeds.derive`` of (seed, stage).
    """

    def __init__(
        self, finest: np.ndarray, batch_size: int, balance: str, steps_per_epoch: int | None, key: int
    ) -> None:
        self.num_rows = len(finest)
        self.batch_size = min(batch_size, self.num_rows) if steps_per_epoch is None else batch_size
        self.key = key
        kinds = [np.flatnonzero(finest == level) for level in np.unique(finest)]
        self.streams = kinds if balance == "levels" and len(kinds) > 1 else [np.arange(self.num_rows)]
        self.shares = shares(len(self.streams), self.batch_size)
        self.even = steps_per_epoch is None and len(self.streams) == 1
        self.steps = steps_per_epoch or -(-self.num_rows // self.batch_size)
        self._permutation = lru_cache(maxsize=2 * len(self.streams))(self._permute)

    def _permute(self, stream: int, cycle: int) -> np.ndarray:
        rows = self.streams[stream]
        return rows[np.random.default_rng(derive(self.key, stream, cycle)).permutation(len(rows))]

    def _edge(self, step: int) -> int:
        # Rounded as np.linspace rounds: runs begun with that go on with the same batches.
        return self.num_rows if step == self.steps else round(step * (self.num_rows / self.steps))

    def batch(self, epoch: int, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Row numbers (b,) and, for each, how often it was drawn before in this stage, (b,)."""
        if self.even:
            # Batches that differ by at most one row: batch norm never meets a last batch of a single row.
            rows = self._permutation(0, epoch)[self._edge(step) : self._edge(step + 1)]
            return rows, np.full(len(rows), epoch)
        rows, cycles = [], []
        for stream, share in enumerate(self.shares):
            positions = (epoch * self.steps + step) * share + np.arange(share)
            cycle, offset = np.divmod(positions, len(self.streams[stream]))
            rows.append(
                np.concatenate(
                    [self._permutation(stream, int(c))[offset[cycle == c]] for c in np.unique(cycle)] or [offset]
                )
            )
            cycles.append(cycle)
        return np.concatenate(rows), np.concatenate(cycles)


def shares(num_kinds: int, batch_size: int) -> list[int]:
    """Rows of each kind in a batch, coarse to fine: half for the finest, the rest evenly.

    ``shares(3, 64) == [16, 16, 32]``.
    """
    if num_kinds == 1:
        return [batch_size]
    coarse = batch_size // 2
    sizes = [coarse // (num_kinds - 1) + (i < coarse % (num_kinds - 1)) for i in range(num_kinds - 1)]
    return [*sizes, batch_size - coarse]


class DeviceData:
    """Rows made ready for a model: small images live on the device as one uint8 tensor, others are fetched by batch."""

    def __init__(self, data: LabelledData, preprocessing: AnyPreprocessing, device: torch.device) -> None:
        if isinstance(data.inputs, list) and isinstance(preprocessing, TextEncoding):
            data = replace(data, inputs=preprocessing.encode(data.inputs))
        if data.image_shape != (preprocessing.channels, preprocessing.height, preprocessing.width):
            raise DataError(f"{data.name!r} has images of shape {data.image_shape}, the model wants {preprocessing}")
        self.data = data
        self.images = data.inputs.to(device) if isinstance(data.inputs, Tensor) else None
        self.labels = torch.from_numpy(data.taxonomy.columns(data.labels)).to(device)
        self.index = torch.from_numpy(data.index).to(device)
        self.levels = data.taxonomy.levels
        self.preprocessing = preprocessing
        self.device = device

    def __len__(self) -> int:
        return len(self.index)

    def ahead(self, batches: Iterable[np.ndarray], workers: int) -> AbstractContextManager[Iterator[Tensor | None]]:
        """What to pass to ``batch`` as ``images`` for each of the batches to come, in their order.

        Pictures that are not on the device are decoded ahead by so many processes; for others it is None.
        """
        if isinstance(self.data.inputs, LazyImages):
            return Ahead(self.data.inputs, batches, workers)
        return nullcontext(repeat(None))

    def batches(self, size: int = 256) -> Iterator[Batch]:
        """All rows, in their order, so many at a time."""
        for start in range(0, len(self), size):
            yield self.batch(np.arange(start, min(start + size, len(self))))

    def batch(
        self,
        rows: np.ndarray,
        augmentation: Augmentation | None = None,
        key: int = 0,
        draws: np.ndarray | None = None,
        distortion: Distortion | None = None,
        images: Tensor | None = None,
        other: int | None = None,
    ) -> Batch:
        """The rows as a batch; ``draws`` (how often each was drawn before) and ``key`` decide the augmentation.

        A ``distortion`` acts on pixels in [0, 1] and depends on the row alone. ``images``: the pictures of these rows,
        uint8 (b, c, h, w), where they were decoded ahead. ``other``: the key of a second augmentation of each.
        """
        where = torch.from_numpy(rows).to(self.device)
        images = self.pictures(rows, images)
        index = self.index[where]
        views = [images] if other is None else [images, images]
        if augmentation is not None and draws is not None:
            counter = torch.from_numpy(draws).to(self.device) * 2**32 + index
            views = [augmentation(view, one, counter) for view, one in zip(views, (key, other or 0), strict=False)]
        inputs = []
        for view in views:
            pixels = self.preprocessing.pixels(view)
            if distortion is not None:
                pixels = distortion(pixels, index)
            inputs.append(self.preprocessing.normalise(pixels).contiguous(memory_format=torch.channels_last))
        return Batch(inputs[0], self.labels[where], index, self.levels, *inputs[1:])

    def pictures(self, rows: np.ndarray, images: Tensor | None = None) -> Tensor:
        """uint8 (b, c, h, w) on the device; ``images`` where they were decoded ahead."""
        if self.images is not None:
            return self.images[torch.from_numpy(rows).to(self.device)]
        return (self.data.images(rows) if images is None else images).to(self.device)
