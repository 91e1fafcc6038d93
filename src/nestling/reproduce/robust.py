"""What the robust tables share: recipes at every scale, the methods that are compared, and trials.

*Hierarchically Robust Representation Learning*, Qian, Hu, Li, 2020: ERM, example robustness (EL), concept robustness
(CL), both (HRRL), and group DRO as the rival. The small scale is of plantvillage with unbalanced classes, and of some
rows of tiny_imagenet32; the paper's is of ResNet-18 on all of tiny_imagenet32, which stands in for ImageNet.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from nestling.methods.recipe import Optimizer
from nestling.methods.robust import Robust
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Place, Trial

ERM, EL, CL, HRRL, DRO = "ERM", "EL", "CL", "HRRL", "group DRO"
METHODS: Mapping[str, Mapping[str, Any]] = {
    ERM: {"tau": 0.0, "strength": "off"},
    EL: {"tau": 0.5, "strength": "off"},
    CL: {"tau": 0.0, "strength": 10.0},
    HRRL: {"tau": 0.5, "strength": 10.0},
    DRO: {"tau": 0.0, "strength": 10.0, "ascent": "group-dro"},
}
"""tau = 0.5 and lambda = 10, where a small regime shows the effects."""

PAPER_OPTIMIZER = Optimizer(
    name="sgd", lr=0.1, momentum=0.9, weight_decay=1e-4, schedule="steps", drops=(1 / 3, 2 / 3), factor=10.0
)
"""Section 4: 90 epochs, the rate divided by 10 after 30 and 60."""
SMALL_OPTIMIZER = Optimizer(name="sgd", lr=0.05, momentum=0.9, weight_decay=5e-4, schedule="cosine")


def on_plants(scale: str, method: str, **more: Any) -> Robust:
    """The regime of unbalanced concepts: every class is a concept; the worst one chooses the epoch, for all methods."""
    recipe = on_images(scale, method, selection="worst-concept", **more)
    return recipe if scale == "paper" else replace(recipe, concept_level="fine", epochs=20, batch_size=64)


def on_images(scale: str, method: str, **more: Any) -> Robust:
    """The benchmark that features are learned from: its coarse classes are the concepts.

    Validation likelihood chooses the epoch, for all methods; at the paper's scale the last one is kept.
    """
    settings = {
        **METHODS[method],
        "balance": "rows",
        "augmentation": "crop-mirror",
        "selection": "last" if scale == "paper" else "likelihood",
        **more,
    }
    if scale == "paper":
        return Robust(epochs=90, batch_size=256, optimizer=PAPER_OPTIMIZER, **settings)
    return Robust(epochs=8, batch_size=128, optimizer=SMALL_OPTIMIZER, **settings)


def plants(scale: str) -> Rows:
    """15 classes of plantvillage, 400 to 40 rows each, and 25 rows of each to choose by."""
    if scale == "paper":
        return Rows(source="tiny_imagenet32", validation=0.1)
    return Rows(source="plantvillage", image_size=32, sizes=(400, 40), validation=25)


def images(scale: str) -> Rows:
    """The benchmark's rows, a tenth of them to choose by."""
    return Rows(source="tiny_imagenet32", train=None if scale == "paper" else 8000, validation=0.1)


def backbone(scale: str, small: str) -> str:
    """ResNet-18 with the stem for 32x32 images at the paper's scale."""
    return "resnet18" if scale == "paper" else small


def trial(
    scale: str,
    row: str,
    recipe: Robust,
    rows: Rows,
    measure: Callable[[Trial, Place], list[Cell]],
    network: str,
    options: Mapping[str, Any] | None = None,
) -> Trial:
    """A trial, shrunk to a moment at smoke; every training row trains, and validation rows choose the epoch."""
    made = Trial(
        row=row, recipe=recipe, rows=rows, measure=measure, options=options or {}, backbone=backbone(scale, network)
    )
    return shrunk(made) if scale == "smoke" else made


def shrunk(trial: Trial) -> Trial:
    """The same in a moment: a network of few channels, one step, few rows. Its figures mean nothing."""
    recipe = replace(trial.recipe, epochs=1, steps_per_epoch=1, batch_size=16)
    few = {"train": 3000, "sizes": (12, 4), "validation": 4} if trial.rows.sizes else {"train": 400, "validation": 0.2}
    rows = replace(trial.rows, test=100, **few)
    return replace(trial, recipe=recipe, rows=rows, backbone="conv:4/4")
