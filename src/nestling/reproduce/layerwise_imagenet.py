"""The layerwise tables on ImageNet, with tiny_imagenet32 in its place: Tables 1, 6, 7 and 8, and Figure 3."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from nestling.methods.layerwise import Layerwise
from nestling.models.build import build_model
from nestling.models.layerwise import LayerwiseModel
from nestling.reproduce.layerwise import on_imagenet, rises, rows_of, trial, twin
from nestling.reproduce.measures import accuracies
from nestling.reproduce.probes import from_scratch, num_parameters, reductions, transfer
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Claim, Floor, Table, Trial, better
from nestling.taxonomy import Taxonomy

SOURCE = "tiny_imagenet32"
ROWS = 15_000
"""That train at small."""
TOP5 = "top-5 single"
HALF, QUARTER, TWIN = "k=3, M~f/2", "k=3, M~f/4", "end-to-end of k=3, M~f/4"


def last_width(recipe: Layerwise) -> int:
    """M~_f where it is not reduced: doubled at each halving between the layers."""
    return (recipe.aux_width or recipe.width) * 2 ** len(recipe.downsample_at)


def reduced_trials(scale: str) -> list[Trial]:
    """k = 3 and its narrower last classifiers, and the end-to-end twin of the narrowest."""
    rows = rows_of(scale, SOURCE, ROWS)
    recipe = on_imagenet(scale, 3)
    full = last_width(recipe)
    narrower = {HALF: full // 2, QUARTER: full // 4}
    if scale == "smoke":
        narrower = {HALF: 3, QUARTER: 2}
    options = {"top": 5, "train": 5000}
    end_to_end = twin(replace(recipe, final_aux_width=full // 4))
    return [
        trial(scale, "k=3", recipe, rows, reductions, {**options, "narrower": narrower}),
        trial(scale, TWIN, end_to_end, rows, reductions, options),
    ]


def imagenet_trials(scale: str) -> list[Trial]:
    rows = rows_of(scale, SOURCE, ROWS)
    options = {"top": 5, "train": 5000}
    return [
        *(trial(scale, f"k={k}", on_imagenet(scale, k), rows, reductions, options) for k in (1, 2)),
        *reduced_trials(scale),
    ]


def real_networks() -> list[Cell]:
    """Parameters of the paper's own networks for 224x224 images of 1,000 classes, counted on the meta device."""
    import torch

    found = []
    classes = Taxonomy.from_paths([(str(number),) for number in range(1000)])
    for k, final in ((1, None), (2, None), (3, None), (3, 512)):
        with torch.device("meta"):
            model = build_model(classes, (3, 224, 224), method="layerwise", options=on_imagenet("paper", k).network())
            assert isinstance(model, LayerwiseModel)
            model.add_auxiliary_head(after=len(model.blocks) - 1, width=final)
        name = f"for ImageNet: k={k}" + (f", M~f={final}" if final else "")
        found.append(Cell(name, "parameters", float(num_parameters(model))))
    return found


REDUCED = {
    ("k=3", "single"): 0.697, ("k=3", TOP5): 0.887, ("k=3", "ensemble"): 0.716, ("k=3", "top-5 ensemble"): 0.898,
    (HALF, "single"): 0.692, (HALF, TOP5): 0.886,
    (QUARTER, "single"): 0.687, (QUARTER, TOP5): 0.885,
    (TWIN, "single"): 0.715, (TWIN, TOP5): 0.901,
}  # fmt: skip
NEAR = [
    Claim(
        id=f"{name}-near-full",
        text=f"a last classifier of {name} of the width loses less than {100 * most:.1f} points (top-5)",
        more=(row, TOP5),
        less=("k=3", TOP5),
        paper=effect,
        least=-most,
    )
    for name, row, effect, most in (("half", HALF, -0.001, 0.01), ("quarter", QUARTER, -0.002, 0.01))
]
NEAR_TWIN = Claim(
    id="quarter-near-end-to-end",
    text="k=3 with a quarter of M~f loses less than 1.6 points to end-to-end (top-5)",
    more=(QUARTER, TOP5),
    less=(TWIN, TOP5),
    paper=-0.016,
    least=-0.016,
)
FLOOR = Floor(row=TWIN, column=TOP5, least=0.3)

IMAGENET = Table(
    name="layerwise-imagenet",
    paper="Shallow Learning for Deep Networks, Tables 1 and 6, Figure 3",
    about="tiny_imagenet32 in ImageNet's place: the paper's numbers are of other data. Eight layers; training accuracy "
    "is of 5,000 rows without augmentation. The last rows count the parameters of the paper's own networks.",
    trials=imagenet_trials,
    floor=FLOOR,
    printed={
        **REDUCED,
        ("k=1", "single"): 0.581, ("k=1", TOP5): 0.797, ("k=1", "ensemble"): 0.593, ("k=1", "top-5 ensemble"): 0.808,
        ("k=2", "single"): 0.657, ("k=2", TOP5): 0.863, ("k=2", "ensemble"): 0.671, ("k=2", "top-5 ensemble"): 0.870,
        ("for ImageNet: k=1", "parameters"): 406e6, ("for ImageNet: k=2", "parameters"): 64.4e6,
        ("for ImageNet: k=3", "parameters"): 102.1e6, ("for ImageNet: k=3, M~f=512", "parameters"): 46.4e6,
    },
    claims=[
        better("k2-over-k1", "k=2 is better than k=1 (top-5)", "k=2", "k=1", 0.066, TOP5),
        better("k3-over-k2", "k=3 is better than k=2 (top-5)", "k=3", "k=2", 0.024, TOP5),
        *(
            Claim(
                id=f"k{k}-ensemble", text=f"k={k}: the ensemble is better than the last classifier (top-5)",
                more=(f"k={k}", "top-5 ensemble"), less=(f"k={k}", TOP5), paper=effect,
            )
            for k, effect in ((1, 0.011), (2, 0.007), (3, 0.011))
        ),
        *NEAR,
        NEAR_TWIN,
        *(claim for k in (1, 2, 3) for claim in rises(f"k={k}", "top-5", 8, "top-5 accuracy")),
    ],
    units={"parameters": "millions"},
    fixed=real_networks,
)  # fmt: skip

REDUCE = Table(
    name="layerwise-reduce",
    paper="Shallow Learning for Deep Networks, Section 4.3 and Table 1 (the rows of M~f)",
    about="tiny_imagenet32 in ImageNet's place; the last classifier of k=3 replaced by one of half and a quarter of "
    "its channels, by one more problem. Its trainings are among those of layerwise-imagenet.",
    trials=reduced_trials,
    floor=FLOOR,
    printed=REDUCED,
    claims=[*NEAR, NEAR_TWIN],
    units={"parameters": "millions"},
)

PRINTED_WIDTH = {
    "M": (0.657, 0.719, 0.817, 0.834, 0.872, None, 0.880, 0.887),
    "M/2": (0.601, 0.690, 0.766, 0.778, 0.829, 0.837, 0.862, 0.868),
}
"""Table 7, top-5 accuracy of each layer; some digits are lost in the extraction."""


def width_trials(scale: str) -> list[Trial]:
    rows = rows_of(scale, SOURCE, ROWS)
    recipe = on_imagenet(scale, 3)
    half = replace(recipe, width=recipe.width // 2, aux_width=recipe.aux_width and recipe.aux_width // 2)
    each = {"M": recipe, "M/2": half, "M/2 end-to-end": twin(half)}
    return [trial(scale, name, one, rows, accuracies, {"top": 5}) for name, one in each.items()]


WIDTH = Table(
    name="layerwise-width",
    paper="Shallow Learning for Deep Networks, Table 7",
    about="k=3 on tiny_imagenet32, all widths halved: top-5 accuracy of each layer's classifier. M = 128 in the paper, "
    "32 at small. The twin is that of M/2; layerwise-imagenet has one of M.",
    trials=width_trials,
    floor=Floor(row="M/2 end-to-end", column=TOP5, least=0.3),
    printed={
        (row, f"top-5 layer {j + 1}"): value
        for row, values in PRINTED_WIDTH.items()
        for j, value in enumerate(values)
        if value is not None
    },
    claims=[
        better("wider", "M is better than M/2 at the last layer (top-5)", "M", "M/2", 0.019, "top-5 layer 8"),
        *(
            Claim(
                id=f"cascade-{row}", text=f"{row}: the cascade gains from layer 1 to layer 8 (top-5)",
                more=(row, "top-5 layer 8"), less=(row, "top-5 layer 1"), paper=effect,
            )
            for row, effect in (("M", 0.230), ("M/2", 0.267))
        ),
        Claim(
            id="depth-over-width", text="layer 8 of M/2 is better than layer 1 of M (top-5)",
            more=("M/2", "top-5 layer 8"), less=("M", "top-5 layer 1"), paper=0.211,
        ),
    ],
)  # fmt: skip

LAYERS = (1, 2, 3, 4, 8)
FROM, CIFAR, SCRATCH = "from tiny_imagenet32", "from cifar100", "from scratch"


def transfer_trials(scale: str) -> list[Trial]:
    targets = {"caltech101": "all", "plantvillage": "all"}
    options = {"layers": LAYERS, "targets": targets, "per_class": 30, "splits": 10, "scratch_splits": 10}
    options |= {"small": {"scratch_splits": 1}, "smoke": SMOKE}.get(scale, {})
    recipe = on_imagenet(scale, 1)
    tiny, hundred = rows_of(scale, SOURCE, ROWS), rows_of(scale, "cifar100", ROWS)
    # The end-to-end rows of Table 8's own data: 30 rows a class, so that its steps are few.
    scratch = replace(twin(recipe), epochs=recipe.num_blocks * (45 if scale == "paper" else 5))
    return [
        trial(scale, FROM, recipe, tiny, transfer, options),
        trial(scale, f"end-to-end {FROM}", twin(recipe), tiny, transfer, options),
        trial(scale, CIFAR, recipe, hundred, transfer, options),
        trial(scale, SCRATCH, scratch, Rows(source="caltech101", split="train"), from_scratch, options),
    ]


SMOKE = {"per_class": 2, "splits": 2, "scratch_splits": 1, "first": 1500, "layers": (1, 8)}
PRINTED_TRANSFER = (0.455, 0.599, 0.700, 0.750, 0.826)

TRANSFER = Table(
    name="layerwise-transfer",
    paper="Shallow Learning for Deep Networks, Table 8",
    about="A linear classifier on the features of k=1 networks, 30 images a class, average per-class accuracy over 10 "
    "splits. The networks are of tiny_imagenet32 and cifar100 and not of ImageNet, and the images 32x32.",
    trials=transfer_trials,
    floor=Floor(row=f"end-to-end {FROM}", column="source", least=0.1),
    printed={
        **{(FROM, f"caltech101 layer {j}"): value for j, value in zip(LAYERS, PRINTED_TRANSFER)},
        (SCRATCH, "caltech101 layer 8"): 0.46,
    },
    claims=[
        *(
            Claim(
                id=f"{target}-layer-{b}-over-{a}", text=f"{target}: layer {b} transfers better than layer {a}",
                more=(FROM, f"{target} layer {b}"), less=(FROM, f"{target} layer {a}"),
                paper=round(PRINTED_TRANSFER[i + 1] - PRINTED_TRANSFER[i], 3) if target == "caltech101" else None,
            )
            for target in ("caltech101", "plantvillage")
            for i, (a, b) in enumerate(pairwise(LAYERS))
        ),
        Claim(
            id="transfer-over-scratch", text="layer 8 transferred is better than the network trained from scratch",
            more=(FROM, "caltech101 layer 8"), less=(SCRATCH, "caltech101 layer 8"), paper=0.366,
        ),
        Claim(
            id="near-end-to-end", text="layer 8 transfers no worse than end-to-end's, by two points",
            more=(FROM, "caltech101 layer 8"), less=(f"end-to-end {FROM}", "caltech101 layer 8"), least=-0.02,
        ),
    ],
)  # fmt: skip
