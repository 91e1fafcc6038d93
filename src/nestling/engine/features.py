"""What the frozen part of a network makes of the rows, computed once and kept: derived, never state.

A layer trained on kept maps costs what its own map costs, however deep it stands (layerwise training, Section 3.2).
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nestling.data.batch import Batch
from nestling.data.loader import DeviceData
from nestling.data.transforms import Augmentation
from nestling.engine.runtime import Runtime
from nestling.files import scratch_folder
from nestling.models.weights import weights_hash

AT_ONCE = 256
"""Rows."""
SHARE = 0.5
"""Of the memory or disk that is free, which kept maps may fill."""


class NoRoom(Exception):
    """There is no place for the maps; a run goes on without keeping them."""


class Features:
    """The maps behind ``modules`` of every row of ``data``, in ``views`` fixed augmentations of each.

    Where they fill more than half of the free memory they lie on the disk of ``folder``, in a file without a name.
    It answers as ``DeviceData`` does; ``place`` says where the maps are.
    """

    def __init__(
        self,
        data: DeviceData,
        modules: Sequence[nn.Module],
        runtime: Runtime,
        views: int = 1,
        augmentation: Augmentation | None = None,
        key: int = 0,
        before: Features | None = None,
        folder: Path | None = None,
    ) -> None:
        self.data, self.views, self.runtime = data, views, runtime
        self.hashes = [f"{views} {augmentation} {key}", *map(weights_hash, modules)]
        known = len(before.hashes) - 1 if before is not None and before.fits(data, self.hashes) else 0
        self.maps = torch.empty(0)
        self.place = ""
        if before is not None and known == len(modules):
            # The classifier of a pruned layer was tuned on them: they are the next layer's, too.
            self.maps, self.place = before.maps, before.place
            return
        modes = [(m, m.training) for module in modules for m in module.modules()]
        for module in modules:
            module.eval()
        try:
            total = len(data) * views
            for start in range(0, total, AT_ONCE):
                slots = np.arange(start, min(start + AT_ONCE, total))
                maps = self.compute(slots, modules[known:], before if known else None, augmentation, key)
                if start == 0:
                    self.maps, self.place = self.reserve((total, *maps.shape[1:]), maps.dtype, folder)
                self.maps[start : start + len(slots)] = maps
        finally:
            for module, training in modes:
                module.training = training

    @torch.no_grad()
    def compute(
        self,
        slots: np.ndarray,
        modules: Sequence[nn.Module],
        before: Features | None,
        augmentation: Augmentation | None,
        key: int,
    ) -> Tensor:
        """The maps (b, h, w, channels) of these slots; slot = row x views + view."""
        if before is not None:
            maps = before.at(torch.from_numpy(slots))
        else:
            maps = self.data.batch(slots // self.views, augmentation, key, slots % self.views).inputs
        with self.runtime.autocast():
            for module in modules:
                maps = module(maps)
        return maps.permute(0, 2, 3, 1).contiguous()

    def reserve(self, shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> tuple[Tensor, str]:
        """An empty tensor of this shape, in memory or in a file."""
        size = math.prod(shape) * dtype.itemsize
        megabytes = f"{math.ceil(size / 2**20):,} MiB"
        if self.data.device.type != "cpu":
            free = torch.cuda.mem_get_info()[0] if self.data.device.type == "cuda" else 0
            if size < SHARE * free:
                return torch.empty(shape, dtype=dtype, device=self.data.device), f"{megabytes} on the device"
        if size < SHARE * free_memory():
            return torch.empty(shape, dtype=dtype), f"{megabytes} of memory"
        if size > SHARE * shutil.disk_usage(folder or tempfile.gettempdir()).free:
            raise NoRoom(f"{megabytes} are more than half of what is free in memory and on disk")
        # The mapping outlives the file's name: however a run ends, the room is given back.
        with scratch_folder(folder) as name:
            maps = torch.from_file(str(Path(name) / "maps"), shared=True, size=math.prod(shape), dtype=dtype)
        return maps.view(shape), f"{megabytes} on disk, more than half of the free memory"

    def fits(self, data: DeviceData, hashes: Sequence[str]) -> bool:
        """Whether these maps are where those behind ``hashes`` begin."""
        return self.data is data and self.hashes == list(hashes)[: len(self.hashes)]

    def at(self, slots: Tensor) -> Tensor:
        """The maps of these slots, (b, channels, h, w) on the device, in channels_last."""
        return self.maps[slots.to(self.maps.device)].to(self.data.device).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.data)

    def ahead(self, batches: Iterable[np.ndarray], workers: int) -> AbstractContextManager[Any]:
        """Nothing is to be decoded."""
        return nullcontext(repeat(None))

    def batch(
        self,
        rows: np.ndarray,
        augmentation: Augmentation | None = None,
        key: int = 0,
        draws: np.ndarray | None = None,
        images: Tensor | None = None,
    ) -> Batch:
        """The rows as a batch, whose inputs are maps; each draw of a row takes its next view."""
        view = np.zeros_like(rows) if draws is None else draws % self.views
        where = torch.from_numpy(rows).to(self.data.device)
        inputs = self.at(torch.from_numpy(rows * self.views + view))
        return Batch(inputs, self.data.labels[where], self.data.index[where], self.data.levels)


def free_memory() -> int:
    """Bytes that programs could still take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2 * 2**30
