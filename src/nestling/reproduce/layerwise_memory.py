"""Memory and time of layerwise training beside end-to-end and its honest rival, activation checkpointing.

Bytes and seconds are of the network of width 64 and eight layers on 32x32 maps at batch 256; what they cost in accuracy
is of smaller networks, trained whole.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace

from nestling.engine.estimate import estimate
from nestling.engine.fit import seeded
from nestling.engine.runtime import Runtime
from nestling.methods.layerwise import Layerwise
from nestling.models.build import build_model
from nestling.reproduce.layerwise import on_cifar, rows_of, trial, twin
from nestling.reproduce.measures import accuracies, load, took
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Claim, Floor, Place, Table, Trial
from nestling.seeds import derive

KS = (1, 2, 3)
PLANS = ("layerwise", "end-to-end", "checkpointing")
BATCH = 256
ROWS = 50_000
"""Of cifar10's training split: what an epoch is of."""


def plans(recipe: Layerwise) -> dict[str, Layerwise]:
    """The same network, trained in three ways."""
    whole = twin(recipe)
    return dict(zip(PLANS, (recipe, whole, replace(whole, recompute=True))))


def costs(trial: Trial, place: Place) -> list[Cell]:
    """Bytes of tensors at the largest step of each plan, and seconds of an epoch, the mean over its problems.

    bytes: weights, gradients, the optimiser's state and what is saved for the backward pass; peak bytes: what a step
    has allocated at its highest, working memory included. ``options``: ``network``, a name for the rows; ``backbone``;
    ``steps`` that are timed.
    """
    recipe, network = trial.recipe, trial.options["network"]
    assert isinstance(recipe, Layerwise)
    train = load(trial.rows, place.data_dir).train
    runtime = Runtime.choose(place.device, place.precision)
    cells, found = [], {}
    for name, plan in plans(recipe).items():
        with seeded(derive(place.seed, "weights")):
            backbone = trial.options["backbone"]
            model = build_model(train.taxonomy, train.image_shape, backbone, plan.method, plan.network())
        # The last stage only calibrates.
        estimates = estimate(plan, model, train, train.subset([]), runtime, trial.options["steps"])
        problems = [e for e in estimates if e.gradients]
        steps = sum(plan_epochs(plan)) * (plan.steps_per_epoch or 1)
        found[name] = max(e.parameters + e.gradients + e.optimizer + e.activations for e in problems)
        peak = max(e.memory for e in problems)
        seconds = sum(e.seconds for e in problems) / steps * ROWS / plan.batch_for(len(train))
        row = f"{network} {name}"
        cells += [Cell(row, "bytes", float(found[name])), Cell(row, "peak bytes", float(peak))]
        cells += [Cell(row, "seconds an epoch", seconds)]
    return [*cells, *(Cell(f"{network} {name}", "of end-to-end", found[name] / found["end-to-end"]) for name in PLANS)]


def plan_epochs(plan: Layerwise) -> list[int]:
    """Of each of its problems."""
    problems = -(-plan.num_blocks // plan.together)
    return list(plan.epochs) if isinstance(plan.epochs, tuple) else [plan.epochs or 20] * problems


def timed(trial: Trial, place: Place) -> list[Cell]:
    """Accuracies, and the seconds of the whole training where it was not interrupted."""
    cells = [c for c in accuracies(trial, place) if c.column in ("single", "ensemble")]
    with suppress(OSError):
        seconds = json.loads(took(place.training(trial)).read_text(encoding="utf-8"))["seconds"]
        cells.append(Cell(trial.row, "seconds in all", seconds))
    return cells


def memory_trials(scale: str) -> list[Trial]:
    rows = rows_of(scale, "cifar10", 5000)
    found = []
    for k in KS:
        recipe = on_cifar(scale, k)
        if scale == "small":
            recipe = replace(recipe, epochs=2)
        found += [trial(scale, f"k={k} {name}", plan, rows, timed) for name, plan in plans(recipe).items()]
    few = Rows(source="cifar10", train=2 * BATCH, test=1)
    wide = Layerwise(
        width=64, num_blocks=8, downsample_at=(), batch_size=BATCH, epochs=1, steps_per_epoch=1,
        augmentation="crop-mirror", optimizer=on_cifar("small", 1).optimizer,
    )  # fmt: skip
    plain = replace(wide, k=1, norm="none")
    networks = {f"k={k}": (replace(wide, k=k) if k > 1 else plain, "auto") for k in KS} | {"vgg11": (plain, "vgg11")}
    for name, (recipe, backbone) in networks.items():
        small = f"{backbone}-4" if scale == "smoke" and backbone != "auto" else backbone
        options = {"network": name, "backbone": small, "steps": 1 if scale == "smoke" else 3}
        found.append(trial(scale, f"{name} costs", recipe, few, costs, options))
    return found


def less(id: str, text: str, more: str, smaller: str, least: float = 0.0, column: str = "of end-to-end") -> Claim:
    return Claim(id=id, text=text, more=(more, column), less=(smaller, column), least=least)


MEMORY = Table(
    name="layerwise-memory",
    paper="Shallow Learning for Deep Networks, Sections 1 and 4.3 (claims without numbers)",
    about="Bytes of tensors and seconds an epoch (50,000 rows, mean over the layers) of eight layers of width 64 on "
    "32x32 maps, batch 256; accuracy and seconds in all of the smaller networks of layerwise-cifar10 (at small on "
    "5,000 rows, two epochs a layer). k=1 and VGG have no batch norm where bytes are counted, as in the paper.",
    trials=memory_trials,
    floor=Floor(row="k=3 end-to-end", column="single", least=0.35),
    claims=[
        less(
            "k1-share", "k=1: layerwise takes at most 0.40 of end-to-end's bytes", "k=1 end-to-end", "k=1 layerwise",
            0.6,
        ),
        *(
            less(
                f"{name}-under-checkpointing", f"{name}: layerwise takes fewer bytes than checkpointing",
                f"{name} checkpointing", f"{name} layerwise",
            )
            for name in ("k=1", "k=2", "k=3", "vgg11")
        ),
        less(
            "k1-time", "k=1: a layerwise epoch takes no longer than one of checkpointing", "k=1 checkpointing",
            "k=1 layerwise", column="seconds an epoch",
        ),
        *(
            Claim(
                id=f"k{k}-accuracy", text=f"k={k}: layerwise loses less than 1.4 points to end-to-end",
                more=(f"k={k} layerwise", "single"), less=(f"k={k} end-to-end", "single"), least=-0.014,
                paper=-0.014 if k == 1 else None,
            )
            for k in KS
        ),
    ],
    units={"bytes": "bytes", "peak": "bytes", "seconds": "seconds"},
)  # fmt: skip
