"""The networks that layerwise training is measured on, and the ways to train them."""

from __future__ import annotations

from dataclasses import dataclass, replace

from nestling.methods import Layerwise, Optimizer
from nestling.methods.layerwise import ALL

WAYS = ("layerwise", "end-to-end", "checkpointing")


@dataclass(frozen=True, kw_only=True)
class Network:
    """A network on noise without downsampling, or a known one by its ``backbone``; fp32."""

    k: int = 1
    width: int = 64
    num_blocks: int = 8
    side: int = 32
    batch: int = 256
    backbone: str = "auto"

    def recipe(self, way: str, **fields: object) -> Layerwise:
        """One of ``WAYS`` to train it: layer by layer, all layers at once, the same with maps computed again."""
        recipe = Layerwise(
            k=self.k,
            width=self.width,
            num_blocks=self.num_blocks,
            downsample_at=(),
            # As in the paper's tables: its networks of k = 1 have no batch norm, those of k = 2 and 3 have.
            norm="none" if self.k == 1 else "batch",
            batch_size=self.batch,
            steps_per_epoch=2,
            epochs=1,
            augmentation="crop-mirror",
            optimizer=Optimizer(name="sgd", lr=1e-3),
        )
        if way != "layerwise":
            recipe = replace(recipe, together=ALL, recompute=way == "checkpointing")
        return replace(recipe, **fields)  # type: ignore[arg-type]


NETWORKS = {
    "k=1": Network(),
    "k=2": Network(k=2),
    "k=3": Network(k=3),
    "vgg11": Network(backbone="vgg11"),
}
SMALL = {"k=1": Network(width=4, num_blocks=5, side=16, batch=16)}
"""So small that the figures mean nothing."""
