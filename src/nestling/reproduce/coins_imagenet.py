"""Table 4 of search from coarse labels: momentum contrast, with and without coarse labels, on tiny_imagenet32.

Features are judged frozen: by a linear classifier of the fine classes, and by search.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from nestling.evaluate.linear import linear_evaluation
from nestling.methods.coins import Coins, Moco
from nestling.reproduce.coins import KS, PAPER_OPTIMIZER, searched
from nestling.reproduce.measures import trained
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Floor, Place, Table, Trial, better

SOURCE = "tiny_imagenet32"
PRINTED = {
    "moco": (0.675, 0.880, 0.428, 0.529, 0.624, 0.711),
    "cos": (0.604, 0.830, 0.211, 0.289, 0.379, 0.482),
    "moco-coarse": (0.704, 0.899, 0.514, 0.615, 0.707, 0.784),
    "opt": (0.762, 0.929, 0.664, 0.753, 0.821, 0.873),
}
COLUMNS = ("linear top-1", "linear top-5", *(f"fine R@{k}" for k in KS))


def frozen(trial: Trial, place: Place) -> list[Cell]:
    """What ``searched`` measures, and the accuracy on test rows of a linear classifier of the fine classes.

    It learns from the fine labels of the training rows, on features without augmentation.
    """
    found = trained(trial, place)
    device = found.runtime.device
    (train, train_labels), (test, test_labels) = (
        (torch.from_numpy(found.embed(rows)).to(device), torch.from_numpy(rows.labels[:, -1]).to(device))
        for rows in (found.train, found.test)
    )
    shares = linear_evaluation(train, train_labels, test, test_labels)
    count = len(found.test)
    return [
        *searched(trial, found),
        *(Cell(trial.row, f"linear top-{k}", shares[f"top{k}"], count=count) for k in (1, 5)),
    ]


def of_moco(scale: str, variant: str) -> Coins:
    """MoCo-v2's settings: 200 epochs, rate 0.03, cosine, T = 0.2, 128 features, 65,536 keys (at most half of the rows).

    At small a shorter memory and a quicker copy, since there are few steps.
    """
    small = scale != "paper"
    return Coins(
        variant=variant,
        epochs=8 if small else 200,
        batch_size=128 if small else 256,
        temperature=0.2,
        mlp=128,
        augmentation="strong",
        moco=Moco(queue=4096, momentum=0.99) if small else Moco(),
        optimizer=replace(PAPER_OPTIMIZER, lr=0.06 if small else 0.03, weight_decay=1e-4, schedule="cosine"),
    )


def of_labels(scale: str, variant: str) -> Coins:
    """Classification as torchvision's reference trains it, for 90 epochs; at small as long as the others."""
    small = scale != "paper"
    thirds = replace(PAPER_OPTIMIZER, weight_decay=1e-4, factor=10.0, drops=(0.3333333333, 0.6666666667))
    return Coins(
        variant=variant,
        epochs=8 if small else 90,
        batch_size=128 if small else 256,
        augmentation="crop-mirror",
        optimizer=replace(thirds, schedule="cosine") if small else thirds,
    )


def imagenet_trials(scale: str) -> list[Trial]:
    rows, network = Rows(source=SOURCE), "resnet50"
    if scale != "paper":
        rows, network = Rows(source=SOURCE, train=10_000), "conv:32/64/128-128"
    found = []
    for variant in PRINTED:
        recipe = of_moco(scale, variant) if variant.startswith("moco") else of_labels(scale, variant)
        if scale == "smoke":
            recipe = replace(recipe, epochs=1, steps_per_epoch=1, batch_size=16, moco=Moco(queue=32, momentum=0.9))
            rows, network = Rows(source=SOURCE, train=120, test=80), "conv:4/4"
        found.append(Trial(row=variant, recipe=recipe, rows=rows, measure=frozen, backbone=network))
    return found


IMAGENET = Table(
    name="coins-imagenet",
    paper="Weakly Supervised Representation Learning with Coarse Labels, Table 4",
    about="tiny_imagenet32 (8 coarse, 200 fine classes) in ImageNet's place: the paper's numbers are of other data; "
    "pictures are of 32x32, under a stem for such. moco is MoCo-v2, moco-coarse the paper's CoIns: coarse labels "
    "weighted 0.5 beside it; their slow copy normalises by running statistics. They train as MoCo-v2 does (strong "
    "augmentation, a head, more epochs, a lower rate), cos and opt as classifiers do: rows differ in more "
    "than the use of labels. Frozen features, judged by a linear classifier and by search.",
    trials=imagenet_trials,
    floor=Floor(row="opt", column="linear top-1", least=0.1),
    printed={(row, column): value for row, values in PRINTED.items() for column, value in zip(COLUMNS, values)},
    claims=[
        better(f"{slug}-{more}-over-{less}", f"{more} is above {less} in {column}", more, less, effect, column)
        for column, slug, place in (("fine R@1", "search", 2), ("linear top-1", "linear", 0))
        for more, less in (("moco", "cos"), ("moco-coarse", "moco"), ("opt", "moco-coarse"))
        for effect in (round(PRINTED[more][place] - PRINTED[less][place], 3),)
    ],
)
