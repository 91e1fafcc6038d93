"""The layerwise tables on CIFAR-10: Table 2, Figure 2, Table 5, and Section 4.3 on stopping early and compressing."""

from __future__ import annotations

from dataclasses import replace

from nestling.methods.layerwise import Layerwise
from nestling.reproduce.layerwise import on_cifar, passes, rises, rows_of, trial, twin
from nestling.reproduce.probes import pruning, separability
from nestling.reproduce.table import Claim, Floor, Table, Trial

SINGLE, ENSEMBLE = "single", "ensemble"
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


def better(id: str, text: str, more: str, less: str, paper: float | None, column: str = SINGLE) -> Claim:
    return Claim(id=id, text=text, more=(more, column), less=(less, column), paper=paper)


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
    return replace(
        on_cifar(scale, k),
        width=width,
        aux_width=aux_width,
        num_blocks=5,
        downsample_at=(),
        halve_input=scale != "paper",
    )


def separability_trials(scale: str) -> list[Trial]:
    rows = rows_of(scale, "cifar10")
    widths, aux = ((64, 128, 256), 256) if scale == "paper" else ((16, 32), 32)
    epochs = {"smoke": 1, "small": 4, "paper": 50}[scale]
    layers = (5,) if scale == "smoke" else (1, 2, 3, 4, 5)
    options = {"epochs": epochs, "width": 4 if scale == "smoke" else aux, "layers": layers}
    found = []
    for k in KS:
        found += [
            trial(scale, f"k={k}, {name}", separable(scale, k, width, aux), rows, separability, options)
            for width, name in zip(widths, WIDTHS[-len(widths) :])
        ]
        recipe = twin(separable(scale, k, widths[-1], aux))
        found.append(trial(scale, f"k={k} end-to-end", recipe, rows, separability, options))
    return found


WIDTHS = ("M/4", "M/2", "M")
"""M is 256 in the paper, 32 at small, where M/4 is left out."""

SEPARABILITY = Table(
    name="layerwise-separability",
    paper="Shallow Learning for Deep Networks, Figure 2 and Section 4.2",
    about="Test accuracy of probes on the maps behind each layer: one-versus-rest logistic regression on 2x2 averages, "
    "and networks of 1 and 2 convolutions. Five layers of equal width; at small the input is halved first.",
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
    found = []
    for name in DOWNSAMPLINGS:
        recipe = replace(base, downsampling=name)
        found += [trial(scale, name, recipe, rows), trial(scale, f"{name} end-to-end", twin(recipe), rows)]
    return found


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


def unconverged_trials(scale: str) -> list[Trial]:
    rows = rows_of(scale, "cifar10")
    recipe = on_cifar(scale, 2)
    full, few = (50, 10) if scale == "paper" else (8, 1)
    layers = recipe.num_blocks
    mixed = replace(recipe, epochs=(*[few] * (layers - 1), full))
    return [
        trial(scale, "trained", recipe, rows),
        trial(scale, "stopped early", replace(recipe, epochs=few), rows),
        trial(scale, "all but the last stopped early", mixed, rows),
        trial(scale, "end-to-end", twin(recipe), rows),
    ]


UNCONVERGED = Table(
    name="layerwise-unconverged",
    paper="Shallow Learning for Deep Networks, Section 4.3 (a remark without numbers)",
    about="k=2 on cifar10: layers that stop after a fifth (small: an eighth) of their epochs, and those on them.",
    trials=unconverged_trials,
    floor=Floor(row="end-to-end", column=SINGLE, least=0.6),
    claims=[
        *rises("stopped early", "", 4, "accuracy"),
        Claim(
            id="last-on-stopped",
            text="a last layer that is trained, on layers that stopped early, is better than one trained layer",
            more=("all but the last stopped early", SINGLE),
            less=("trained", "layer 1"),
        ),
        Claim(
            id="last-on-stopped-over-third",
            text="that last layer is better than the stopped layer below it",
            more=("all but the last stopped early", "layer 4"),
            less=("all but the last stopped early", "layer 3"),
        ),
    ],
)


def compression_trials(scale: str) -> list[Trial]:
    rows = rows_of(scale, "cifar10")
    wide, narrow = (128, 64) if scale == "paper" else (32, 16)
    tuning = 20 if scale == "paper" else 2
    base = replace(on_cifar(scale, 3), num_blocks=3, downsample_at=(), width=wide, aux_width=wide)
    pruned = replace(base, prune_to=0.5, prune_epochs=tuning, final_aux_width=narrow)
    baseline = replace(base, width=narrow, aux_width=narrow)
    end_to_end = replace(twin(baseline), epochs=passes(pruned))
    if scale == "paper":
        # Section 4.3: 120 epochs, the rate divided every 25; the layers, their tuning and the reduction take more.
        drops = tuple(25 * i / 120 for i in range(1, 5))
        end_to_end = replace(end_to_end, epochs=120, optimizer=replace(base.optimizer, drops=drops))
    return [
        trial(scale, "pruned", pruned, rows, pruning, whole=False),
        trial(scale, "not pruned", base, rows, whole=False),
        trial(scale, "layerwise, narrow from the start", baseline, rows, whole=False),
        trial(scale, "end-to-end", end_to_end, rows, whole=False),
    ]


COMPRESSION = Table(
    name="layerwise-compression",
    paper="Shallow Learning for Deep Networks, Section 4.3",
    about="k=3, three layers without downsampling on cifar10: half of each layer's filters removed once it is trained, "
    "the last classifier as narrow. Validation accuracy before and after: these rows, 10 %, do not train.",
    trials=compression_trials,
    floor=Floor(row="end-to-end", column=SINGLE, least=0.55),
    printed={("pruned", SINGLE): 0.876, ("end-to-end", SINGLE): 0.875},
    claims=[
        Claim(
            id="pruned-near-end-to-end",
            text="the pruned network loses less than a point to the end-to-end network of the same architecture",
            more=("pruned", SINGLE),
            less=("end-to-end", SINGLE),
            paper=0.001,
            least=-0.01,
        ),
        better(
            "pruned-over-narrow", "it is better than layers that are narrow from the start", "pruned",
            "layerwise, narrow from the start", None,
        ),
    ],
)  # fmt: skip
