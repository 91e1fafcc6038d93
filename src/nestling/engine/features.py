"""What the frozen part of a network makes of the rows, computed once and kept: derived, never state.

A layer trained on kept maps costs what its own map costs, however deep it stands (layerwise training, Section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from nestling.data.batch import Batch
from nestling.data.distortions import Distortion
from nestling.data.loader import DeviceData
from nestling.data.transforms import Augmentation
from nestling.engine.room import NoRoom, reserve
from nestling.engine.runtime import Runtime
from nestling.methods.recipe import Stage
from nestling.models.weights import weights_hash
from nestling.seeds import derive

if TYPE_CHECKING:
    from nestling.engine.fit import Engine

AT_ONCE = 256
"""Maps."""


class Features:
    """The maps behind ``modules`` of these rows of ``data``, in ``views`` fixed augmentations of each.

    Where they fill more than half of the free memory they lie on the disk of ``folder``, in a file without a name.
    It answers as ``DeviceData`` does, of these rows; ``place`` says where the maps are. ``obey`` is called between
    batches, equally often on every process, and may raise. Raises NoRoom.
    """

    def __init__(
        self,
        data: DeviceData,
        rows: np.ndarray,
        modules: Sequence[nn.Module],
        runtime: Runtime,
        views: int = 1,
        augmentation: Augmentation | None = None,
        key: int = 0,
        before: Features | None = None,
        folder: Path | None = None,
        obey: Callable[[], object] = lambda: None,
    ) -> None:
        self.data, self.rows, self.views, self.runtime = data, np.unique(rows), views, runtime
        self.preprocessing = data.preprocessing
        self.plain = views == 1 and augmentation in (None, Augmentation())
        """Whether the maps are those of the pictures as they are."""
        self.hashes = [f"{views} {augmentation} {key}", *map(weights_hash, modules)]
        known = len(before.hashes) - 1 if before is not None and self.begins_as(before) else 0
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
            total = len(self) * views
            for start in range(0, total, AT_ONCE):
                slots = np.arange(start, min(start + AT_ONCE, total))
                maps = self.compute(slots, modules[known:], before if known else None, augmentation, key)
                if start == 0:
                    self.maps, self.place = reserve((total, *maps.shape[1:]), maps.dtype, data.device, folder)
                self.maps[start : start + len(slots)] = maps
                obey()
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
        """The maps (b, h, w, channels) of these slots; slot = place among the rows x views + view."""
        if before is not None:
            maps = before.at(torch.from_numpy(slots))
        else:
            maps = self.data.batch(self.rows[slots // self.views], augmentation, key, slots % self.views).inputs
        with self.runtime.autocast():
            for module in modules:
                # As kept maps lie: on some processors the layout decides the last bit, and a resume knows none of them.
                maps = module(maps).contiguous(memory_format=torch.channels_last)
        return maps.permute(0, 2, 3, 1).contiguous()

    def begins_as(self, before: Features) -> bool:
        """Whether other maps are of the same rows, and where these begin."""
        same = self.data is before.data and np.array_equal(self.rows, before.rows)
        return same and self.hashes[: len(before.hashes)] == before.hashes

    def at(self, slots: Tensor) -> Tensor:
        """The maps of these slots, (b, channels, h, w) on the device, in channels_last."""
        return self.maps[slots.to(self.maps.device)].to(self.data.device).permute(0, 3, 1, 2)

    def __len__(self) -> int:
        return len(self.rows)

    def ahead(self, batches: Iterable[np.ndarray], workers: int) -> AbstractContextManager[Any]:
        """Nothing is to be decoded."""
        return nullcontext(repeat(None))

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
        """The rows, numbers in ``data``, as a batch whose inputs are maps; each draw of a row takes its next view."""
        assert other is None, "a pair of views is made of pictures"
        assert distortion is None, "maps are kept of the pictures as they are"
        view = np.zeros_like(rows) if draws is None else draws % self.views
        where = torch.from_numpy(rows).to(self.data.device)
        inputs = self.at(torch.from_numpy(np.searchsorted(self.rows, rows) * self.views + view))
        return Batch(inputs, self.data.labels[where], self.data.index[where], self.data.levels)


def keep_features(
    engine: Engine, stage: Stage, rows: np.ndarray, note: Callable[[str, object, str], None]
) -> Features | None:
    """The maps behind a stage's prefix; None where they are not kept. That is noted, and a resume does the same.

    On kept maps figures agree with those of a run without them to rounding, not to the last bit.
    """
    assert stage.views is not None
    name = f"features of {stage.name}"
    earlier = engine.folder.kept(name) if engine.folder else None
    if earlier == "not kept":
        note(name, earlier, "as the run began")
        return None
    try:
        kept = Features(
            engine.device_data(stage.data),
            rows,
            stage.prefix,
            engine.runtime,
            stage.views,
            stage.augmentation,
            derive(engine.seed, "views"),
            engine.features,
            engine.folder.path if engine.folder else None,
            lambda: engine.obey(f"while the features of stage {stage.name} are computed"),
        )
    except NoRoom as error:
        begun_with = "" if earlier is None else "; the run began with them, and goes on alike but for rounding"
        note(name, "not kept", f"{error}{begun_with}")
        return None
    engine.features = kept
    note(name, "kept", f"{kept.place}, computed once for {len(kept)} rows")
    return kept
