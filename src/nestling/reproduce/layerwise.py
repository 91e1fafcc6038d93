"""What the layerwise tables share: the paper's recipes, smaller ones for two cores, twins, and trials.

*Shallow Learning for Deep Networks*, Belilovsky, Eickenberg, Oyallon, 2019. The small scale is of 10,000 rows,
eight epochs a layer (15,000 and three in ImageNet's place) and an invertible downsampling of the input, which quarters
the work.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nestling.methods.layerwise import Layerwise
from nestling.methods.prune import Compression
from nestling.methods.recipe import Optimizer
from nestling.reproduce.measures import accuracies
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Claim, Place, Trial

Measure = Callable[[Trial, Place], list[Cell]]

PAPER_OPTIMIZER = Optimizer(
    name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="steps", drops=(0.3, 0.6, 0.9), factor=5.0,
    restarts=True,
)  # fmt: skip
"""Section 4: the rate divided by 5 every 15 of 50 epochs."""
IMAGENET_OPTIMIZER = replace(PAPER_OPTIMIZER, drops=(20 / 45, 40 / 45), factor=10.0)
"""Section 4: divided by 10 every 20 of 45 epochs."""
SMALL_OPTIMIZER = Optimizer(name="sgd", lr=0.1, momentum=0.9, weight_decay=5e-4, schedule="cosine")


def on_cifar(scale: str, k: int) -> Layerwise:
    """Table 2: k = 1 of five wide layers without batch norm, k = 2 and 3 of four with it; at small all alike."""
    if scale != "paper":
        return Layerwise(
            k=k, width=32, num_blocks=4, downsample_at=(2,), halve_input=True, epochs=8, batch_size=128,
            augmentation="crop-mirror", optimizer=SMALL_OPTIMIZER,
        )  # fmt: skip
    common = Layerwise(k=k, epochs=50, batch_size=128, augmentation="crop-mirror", optimizer=PAPER_OPTIMIZER)
    if k == 1:
        return replace(common, width=256, num_blocks=5, downsample_at=(1, 3), norm="none")
    return replace(common, width=128, aux_width=256, num_blocks=4, downsample_at=(2,))


def on_imagenet(scale: str, k: int) -> Layerwise:
    """Tables 3 and 4: eight layers on an input that is halved first."""
    if scale != "paper":
        return Layerwise(
            k=k, width=32, num_blocks=8, downsample_at=(2, 4, 6), halve_input=True, epochs=3, batch_size=128,
            augmentation="crop-mirror", optimizer=SMALL_OPTIMIZER,
        )  # fmt: skip
    common = Layerwise(
        k=k, num_blocks=8, halve_input=True, epochs=45, batch_size=256, augmentation="crop-mirror",
        optimizer=IMAGENET_OPTIMIZER,
    )  # fmt: skip
    if k == 1:
        return replace(common, width=256, downsample_at=(2, 3, 4, 6), norm="none")
    return replace(common, width=128, aux_width=256, downsample_at=(2, 4, 6))


def twin(recipe: Layerwise, share: int = 1) -> Layerwise:
    """End-to-end: the same network under its last classifier, for as many images as all its problems together had.

    ``share`` divides them.
    """
    epochs, last = max(passes(recipe) // share, 1), recipe.final_aux_width
    if last is not None:
        recipe = replace(recipe, aux_width=max(last // 2 ** len(recipe.downsample_at), 1), final_aux_width=None)
    return replace(recipe, together=recipe.num_blocks, epochs=epochs, compression=Compression(), similarity=0.0)


def passes(recipe: Layerwise) -> int:
    """How often a recipe sees every row: for each layer, for its tuning where it is pruned, and for the reduction."""
    layers, epochs = recipe.num_blocks, recipe.epochs or 20
    each = epochs if isinstance(epochs, tuple) else (epochs,) * (layers + (recipe.final_aux_width is not None))
    return sum(each) + (0 if recipe.compression.share is None else layers * recipe.compression.epochs)


def rows_of(scale: str, source: str, train: int | None = 10_000) -> Rows:
    """The rows of a scale: all of them at the paper's."""
    if scale == "paper":
        return Rows(source=source)
    return Rows(source=source, train=train, test=None)


def trial(
    scale: str,
    row: str,
    recipe: Layerwise,
    rows: Rows,
    measure: Measure = accuracies,
    options: Mapping[str, Any] | None = None,
    whole: bool = True,
) -> Trial:
    """A trial, shrunk to a moment at smoke."""
    made = Trial(row=row, recipe=recipe, rows=rows, measure=measure, options=options or {}, whole=whole)
    return shrunk(made) if scale == "smoke" else made


def shrunk(trial: Trial) -> Trial:
    """The same in a moment: few channels, one step a layer, few rows. Its figures mean nothing."""
    recipe = trial.recipe
    assert isinstance(recipe, Layerwise)
    final = None if recipe.final_aux_width is None else 2
    recipe = replace(
        recipe,
        width=4,
        aux_width=4,
        final_aux_width=final,
        epochs=1,
        steps_per_epoch=1,
        batch_size=16,
        compression=replace(recipe.compression, epochs=1),
        optimizer=replace(recipe.optimizer, lr=0.01),
    )
    return replace(trial, recipe=recipe, rows=replace(trial.rows, train=100, test=100))


def rises(row: str, kind: str, layers: int, text: str, paper: Mapping[int, float] | None = None) -> list[Claim]:
    """One claim per step in depth: the column ``<kind> layer j+1`` lies above that of layer j."""
    start = f"{kind} layer" if kind else "layer"
    slug = "-".join([*row.replace("=", "").replace(",", "").split(), *kind.split()])
    return [
        Claim(
            id=f"{slug}-layer-{j + 1}-over-{j}",
            text=f"{row}: {text} rises from layer {j} to layer {j + 1}",
            more=(row, f"{start} {j + 1}"),
            less=(row, f"{start} {j}"),
            paper=None if paper is None else paper[j + 1] - paper[j],
        )
        for j in range(1, layers)
    ]
