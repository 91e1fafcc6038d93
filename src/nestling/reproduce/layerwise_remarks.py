"""What Section 4.3 of the layerwise paper remarks, on CIFAR-10: stopping early, compressing; and how the gap closes."""

from __future__ import annotations

from dataclasses import replace

from nestling.methods.layerwise import Layerwise
from nestling.methods.prune import Compression
from nestling.reproduce.layerwise import on_cifar, passes, rises, rows_of, trial, twin
from nestling.reproduce.measures import SINGLE, accuracies
from nestling.reproduce.probes import pruning
from nestling.reproduce.table import Cell, Claim, Floor, Place, Table, Trial, better

GAP = "behind end-to-end"


def beside_twin(trial: Trial, place: Place) -> list[Cell]:
    """Accuracies of a network and of its twin at equal images, and by how much the first stays behind."""
    assert isinstance(trial.recipe, Layerwise)
    mine = accuracies(trial, place)
    theirs = accuracies(replace(trial, recipe=twin(trial.recipe)), place)
    layered, whole = (next(cell for cell in cells if cell.column == SINGLE) for cells in (mine, theirs))
    lost = tuple(b - a for a, b in zip(layered.samples, whole.samples, strict=True))
    return [
        *mine,
        Cell(trial.row, "end-to-end", whole.value, whole.samples),
        Cell(trial.row, GAP, whole.value - layered.value, lost),
    ]


def gap_trials(scale: str) -> list[Trial]:
    """k = 2: the epochs of a layer at one width, and the widths at as many epochs."""
    rows = rows_of(scale, "cifar10")
    recipe = on_cifar(scale, 2)
    epochs, parts = recipe.epochs, (4, 2)
    assert isinstance(epochs, int)
    fewer = (replace(recipe, epochs=max(epochs // by, 1)) for by in parts)
    narrower = (
        replace(recipe, width=recipe.width // by, aux_width=recipe.aux_width and recipe.aux_width // by) for by in parts
    )
    settings = [*fewer, recipe, *narrower]
    return [trial(scale, name, each, rows, beside_twin) for name, each in zip(SETTINGS, settings, strict=True)]


QUARTER, HALF, WHOLE, NARROW, NARROWER = (
    "a quarter of the epochs", "half of the epochs", "as in layerwise-cifar10", "half of the width",
    "a quarter of the width",
)  # fmt: skip
SETTINGS = (QUARTER, HALF, WHOLE, NARROWER, NARROW)

CLOSING = Table(
    name="layerwise-gap",
    paper="beyond Shallow Learning for Deep Networks, Table 2",
    about="k=2 on cifar10, and its end-to-end twin at equal images: what brings them together? A layer has 2, 4 and 8 "
    "epochs at small (12, 25 and 50 at the paper's scale), and a width of 8, 16 and 32 (32, 64 and 128).",
    trials=gap_trials,
    floor=Floor(row=WHOLE, column="end-to-end", least=0.6),
    claims=[
        Claim(
            id=f"closes-{id}", text=f"end-to-end's lead is smaller with {what}", more=(more, GAP), less=(less, GAP)
        )
        for id, what, more, less in (
            ("epochs", "four times the epochs", QUARTER, WHOLE),
            ("more-epochs", "twice the epochs", HALF, WHOLE),
            ("width", "four times the width", NARROWER, WHOLE),
            ("more-width", "twice the width", NARROW, WHOLE),
        )
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
    if scale == "small":
        base = replace(base, epochs=5)
    pruned = replace(base, compression=Compression(share=0.5, epochs=tuning), final_aux_width=narrow)
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
