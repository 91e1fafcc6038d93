"""The layerwise tables on CIFAR-10: Table 2, Figure 2 and Table 5."""

from __future__ import annotations

from dataclasses import replace

from nestling.methods.layerwise import Layerwise
from nestling.reproduce.layerwise import on_cifar, rises, rows_of, trial, twin
from nestling.reproduce.measures import ENSEMBLE, SINGLE
from nestling.reproduce.probes import separability
from nestling.reproduce.table import Claim, Floor, Table, Trial, better

KS = (1, 2, 3)


def cifar10_trials(scale: str) -> list[Trial]:
    rows = rows_of(scale, "cifar10")
    found = []
    for k in KS:
        recipe = on_cifar(scale, k)
        found += [
            trial(scale, f"k={k}", recipe, rows),
            trial(scale, f"k={k} end-to-end", twin(recipe), rows),
            trial(scale, f"k={k} end-to-end, a J-th", twin(recipe, recipe.num_blocks), rows),
        ]
    return found


def gap(k: int, paper: float | None, column: str = SINGLE, most: float = 0.014) -> Claim:
    return Claim(
        id=f"k{k}-near-end-to-end",
        text=f"k={k} loses less than {100 * most:.1f} points to end-to-end at equal images",
        more=(f"k={k}", column),
        less=(f"k={k} end-to-end", SINGLE),
        paper=paper,
        least=-most,
    )


CIFAR10 = Table(
    name="layerwise-cifar10",
    paper="Shallow Learning for Deep Networks, Table 2",
    about="Accuracy per depth on cifar10. End-to-end sees as many images as all layers together, and a J-th of them.",
    trials=cifar10_trials,
    seeds={"smoke": 1, "small": 3, "paper": 3},
    floor=Floor(row="k=3 end-to-end", column=SINGLE, least=0.6),
    printed={
        ("k=1", SINGLE): 0.883,
        ("k=1", ENSEMBLE): 0.884,
        ("k=2", SINGLE): 0.904,
        ("k=2", ENSEMBLE): 0.907,
        ("k=3", SINGLE): 0.917,
        ("k=3", ENSEMBLE): 0.928,
        ("k=1 end-to-end", SINGLE): 0.897,
    },
    claims=[
        better("k2-over-k1", "k=2 is better than k=1", "k=2", "k=1", 0.021),
        better("k3-over-k2", "k=3 is better than k=2", "k=3", "k=2", 0.013),
        *(
            Claim(
                id=f"k{k}-ensemble",
                text=f"k={k}: the ensemble is better than the last classifier",
                more=(f"k={k}", ENSEMBLE),
                less=(f"k={k}", SINGLE),
                paper=effect,
            )
            for k, effect in ((1, 0.001), (2, 0.003), (3, 0.011))
        ),
        gap(1, -0.014),
        gap(2, None),
        gap(3, None),
        *(claim for k in KS for claim in rises(f"k={k}", "", 4, "accuracy")),
    ],
)


def separable(scale: str, k: int, width: int, aux_width: int) -> Layerwise:
    """Section 4.2: five layers, no downsampling between them."""
    recipe = on_cifar(scale, k)
    return replace(
        recipe,
        epochs=4 if scale == "small" else recipe.epochs,
        width=width,
        aux_width=aux_width,
        num_blocks=5,
        downsample_at=(),
        halve_input=scale != "paper",
    )


def separability_trials(scale: str) -> list[Trial]:
    rows = rows_of(scale, "cifar10", 5000)
    widths, aux = ((64, 128, 256), 256) if scale == "paper" else ((16, 32), 32)
    epochs = {"smoke": 1, "small": 2, "paper": 50}[scale]
    layers = (5,) if scale == "smoke" else (1, 2, 3, 4, 5)
    options = {"epochs": epochs, "width": 4 if scale == "smoke" else aux, "layers": layers}
    found = []
    for k in KS:
        found += [
            trial(scale, f"k={k}, {name}", separable(scale, k, width, aux), rows, separability, options)
            for width, name in zip(widths, WIDTHS[-len(widths) :])
        ]
        if k != 2 or scale != "small":
            recipe = twin(separable(scale, k, widths[-1], aux))
            found.append(trial(scale, f"k={k} end-to-end", recipe, rows, separability, options))
    return found


WIDTHS = ("M/4", "M/2", "M")
"""M is 256 in the paper, 32 at small, where M/4 is left out."""

SEPARABILITY = Table(
    name="layerwise-separability",
    paper="Shallow Learning for Deep Networks, Figure 2 and Section 4.2",
    about="Test accuracy of probes on the maps behind each layer: one-versus-rest logistic regression on 2x2 averages, "
    "and networks of 1 and 2 convolutions. Five layers of equal width; at small 5,000 rows train, the input is halved "
    "first, a layer has four epochs, and k=2 no twin.",
    trials=separability_trials,
    floor=Floor(row="k=3 end-to-end", column="CNN-2 layer 5", least=0.5),
    claims=[
        *rises("k=1, M", "linear", 5, "linear separability"),
        *rises("k=3, M", "linear", 5, "linear separability"),
        better(
            "linear-k1-first", "k=1 is more linearly separable than k=3 at layer 1", "k=1, M", "k=3, M", None,
            "linear layer 1",
        ),
        better(
            "linear-k2-last", "k=2 is more linearly separable than k=1 at layer 5", "k=2, M", "k=1, M", None,
            "linear layer 5",
        ),
        better(
            "linear-k3-last", "k=3 is more linearly separable than k=1 at layer 5", "k=3, M", "k=1, M", None,
            "linear layer 5",
        ),
        *(
            better(
                f"cnn{p}-k{k}", f"CNN-{p}-separability at layer 5 is higher for k={k} than for k=1", f"k={k}, M",
                "k=1, M", None, f"CNN-{p} layer 5",
            )
            for p in (1, 2)
            for k in (2, 3)
        ),
    ],
)  # fmt: skip

DOWNSAMPLINGS = {"strided": 0.878, "space-to-depth": 0.883, "average": 0.876, "max": 0.880}


def downsampling_trials(scale: str) -> list[Trial]:
    rows = rows_of(scale, "cifar10")
    base = replace(on_cifar(scale, 1), num_blocks=5, downsample_at=(1, 3))
    found = [trial(scale, name, replace(base, downsampling=name), rows) for name in DOWNSAMPLINGS]
    return [*found, trial(scale, f"{base.downsampling} end-to-end", twin(base), rows)]


DOWNSAMPLING = Table(
    name="layerwise-downsampling",
    paper="Shallow Learning for Deep Networks, Table 5",
    about="k=1 on cifar10, five layers, halved at layers 1 and 3 (from 0) in four ways.",
    trials=downsampling_trials,
    floor=Floor(row="space-to-depth end-to-end", column=SINGLE, least=0.55),
    printed={(name, SINGLE): value for name, value in DOWNSAMPLINGS.items()},
    claims=[
        better(
            f"invertible-over-{name}", f"invertible downsampling is better than {name}", "space-to-depth", name,
            round(0.883 - value, 3),
        )
        for name, value in DOWNSAMPLINGS.items()
        if name != "space-to-depth"
    ],
)  # fmt: skip
