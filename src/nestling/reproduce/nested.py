"""What the nested tables share: the authors' networks and rates, recipes and label mixes at every scale, trials.

*Nested Learning for Multi-Level Classification*, Achddou, Di Martino, Sapiro, 2021. Every method of a table has
the same network, the same rows as far as it may see them, the same batches, temperature step and number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nestling.methods.baselines import EndToEnd, FlatMarginal
from nestling.methods.nested import Nested
from nestling.methods.recipe import Optimizer, Recipe
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Place, Trial

Measure = Callable[[Trial, Place], list[Cell]]
Mix = tuple[int, ...]
Flat = EndToEnd | FlatMarginal

NESTED, OURS, TWIN, MORE = "nested", "nested, marginal + balanced", "end-to-end", "end-to-end, 1.5 f"
MARGINAL, CRM, REJECTION = "flat + marginal", "flat + CRM", "nested + rejection"
"""The rows of a table. ``MORE`` has half as many fine labels again; ``CRM`` decides anew from ``MARGINAL``'s weights,
and ``REJECTION`` is ``NESTED`` with its rejection class: each is measured beside the other."""
BESIDE = {NESTED: REJECTION, MARGINAL: CRM}

RATES = (0.8, 0.5, 0.2)
"""The authors' example: the shares of the rows that have coarse, middle and fine labels."""
MORE_FINE = 1.5
"""Section 3.1: "models trained with 1.5 times more fine annotations"."""
KEPT = 0.1
"""Of the labelled rows of each kind, to choose the epoch and the temperature by."""

PAPER_RATES = (1e-3, 0.5e-3, 0.25e-3)
"""Of the stages; end-to-end has the last one."""
PAPER_OPTIMIZER = Optimizer(name="adam", weight_decay=0.0, schedule="plateau", factor=5.0, patience=5)
SMALL_OPTIMIZER = Optimizer(name="adamw", lr=3e-3, weight_decay=1e-4, schedule="one-cycle")
SMALL_BATCH = 64


@dataclass(frozen=True, kw_only=True)
class Network:
    """One of the authors' networks."""

    backbone: str
    hidden: Mix = ()
    dropout: float = 0.0


MNIST = Network(backbone="conv:2-4/8/16-32")
CIFAR10 = Network(backbone="conv:32-32/64-64/128-128/128", hidden=(100, 50, 0), dropout=0.3)
HALF_CIFAR10 = Network(backbone="conv:16-16/32-32/64-64/64", hidden=(100, 50, 0), dropout=0.3)
"""Half as wide, for two cores."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One set at one scale."""

    source: str
    num_rows: int | None
    """The first rows of the set, which the label mix is drawn from; None for all."""
    known: Mix
    """The label mix: rows labelled up to each level exactly, coarse to fine."""
    network: Network
    epochs: Mix
    """Of the stages of the cascade."""
    test: int | None
    image_size: int | None = None
    augmentation: str = "none"

    def rows(self, known: Mix, *, fine_only: bool = False) -> Rows:
        """The rows of a label mix, or of these those with fine labels alone."""
        return Rows(
            source=self.source,
            train=self.num_rows,
            test=self.test,
            image_size=self.image_size,
            known=known,
            fine_only=fine_only,
            validation=KEPT,
        )


def mix(num_rows: int, rates: tuple[float, float, float] = RATES) -> Mix:
    """How many rows are labelled up to each level exactly, of rates at least so far."""
    coarse, middle, fine = (round(rate * num_rows) for rate in rates)
    return coarse - middle, middle - fine, fine


SIZES: Mapping[str, Mapping[str, tuple[int, Network, Mix, int | None]]] = {
    "smoke": {
        "mnist": (120, Network(backbone="conv:2-2/4/4-8"), (1, 1, 1), 60),
        "fashion_mnist": (120, Network(backbone="conv:2-2/4/4-8"), (1, 1, 1), 60),
        "cifar10": (120, Network(backbone="conv:4/4/4/4", hidden=(8, 4, 0), dropout=0.3), (1, 1, 1), 60),
    },
    "small": {
        "mnist": (6_000, MNIST, (20, 20, 50), 4_000),
        "fashion_mnist": (6_000, MNIST, (20, 20, 50), 4_000),
        "cifar10": (6_000, HALF_CIFAR10, (10, 10, 20), 4_000),
    },
    "paper": {
        "mnist": (60_000, MNIST, (100, 100, 200), None),
        "fashion_mnist": (60_000, MNIST, (100, 100, 200), None),
        "cifar10": (50_000, CIFAR10, (100, 100, 200), None),
    },
}
"""Rows, network, epochs and test rows by scale and set."""


def setting(scale: str, source: str) -> Setting:
    """mnist, fashion_mnist or cifar10 at a scale."""
    num_rows, network, epochs, test = SIZES[scale][source]
    known = mix(num_rows)
    return Setting(source=source, num_rows=num_rows, known=known, network=network, epochs=epochs, test=test)


def nested(scale: str, at: Setting, **more: Any) -> Nested:
    """The paper's cascade on disjoint subsets; ``more`` are other fields of the recipe."""
    if scale == "smoke":
        more["rejection_epochs"] = 1
    made = Nested(
        reading="exact",
        marginal=False,
        balance="rows",
        augmentation=at.augmentation,
        epochs=at.epochs,
        hidden=at.network.hidden,
        dropout=at.network.dropout,
        selection="likelihood",
        **budget(scale, len(at.epochs)),
    )
    return replace(made, **more)


def flat(scale: str, kind: type[EndToEnd] | type[FlatMarginal], at: Setting, **more: Any) -> Flat:
    """A baseline on the same network, with as many steps as the cascade has in all."""
    made = kind(
        balance="levels",
        augmentation=at.augmentation,
        epochs=at.epochs[-1],
        hidden=at.network.hidden,
        dropout=at.network.dropout,
        selection="likelihood",
        **budget(scale, 1),
    )
    return replace(made, **paced(scale, at, at.epochs[-1]), **more)


def budget(scale: str, stages: int) -> dict[str, Any]:
    """Optimiser, batches and when to stop, by scale; the authors' rates of the last stages where there are fewer."""
    if scale == "paper":
        rates = {1: PAPER_RATES[-1:], 2: PAPER_RATES[::2], 3: PAPER_RATES}[stages]
        return {"optimizer": replace(PAPER_OPTIMIZER, lr=rates), "batch_size": 32, "patience": 10}
    if scale == "smoke":
        return {"optimizer": SMALL_OPTIMIZER, "batch_size": 16, "steps_per_epoch": 1}
    return {"optimizer": SMALL_OPTIMIZER, "batch_size": SMALL_BATCH}


def paced(scale: str, at: Setting, epochs: int) -> dict[str, Any]:
    """Steps of an epoch such that all are as many as the cascade's; the paper's own rule says when to stop there."""
    return {"steps_per_epoch": max(-(-steps_of(at.known, at.epochs) // epochs), 1)} if scale == "small" else {}


def steps_of(known: Mix, epochs: Mix) -> int:
    """Of the whole cascade at the small scale: a pass over the rows of each stage that are not kept, an epoch."""
    return sum(-(-int((1 - KEPT) * count) // SMALL_BATCH) * passes for count, passes in zip(known, epochs, strict=True))


def recipes(scale: str, at: Setting) -> dict[str, Recipe]:
    """Every method by its row."""
    default: dict[str, Any] = {"reading": "at-least", "marginal": True, "balance": "levels"}
    return {
        NESTED: nested(scale, at, calibration="both"),
        OURS: nested(scale, at, **default, **paced(scale, at, sum(at.epochs))),
        TWIN: flat(scale, EndToEnd, at),
        MORE: flat(scale, EndToEnd, at),
        MARGINAL: flat(scale, FlatMarginal, at),
    }


def rows_for(row: str, at: Setting) -> Rows:
    """What a method may see: the label mix, its fine labels alone, or half as many of those again."""
    if row == MORE:
        return at.rows((*(0,) * (len(at.known) - 1), round(MORE_FINE * at.known[-1])), fine_only=True)
    return at.rows(at.known, fine_only=row == TWIN)


def compare(
    scale: str,
    at: Setting,
    measure: Measure,
    methods: tuple[str, ...] = (NESTED, OURS, TWIN, MORE, MARGINAL),
    prefix: str = "",
    options: Mapping[str, Any] | None = None,
) -> list[Trial]:
    """A trial for each method on one set; ``options['also']`` names the row that is measured beside."""
    made = recipes(scale, at)
    return [
        Trial(
            row=f"{prefix}{row}",
            recipe=made[row],
            rows=rows_for(row, at),
            measure=measure,
            options={**(options or {}), **({"also": [f"{prefix}{BESIDE[row]}"]} if row in BESIDE else {})},
            backbone=at.network.backbone,
        )
        for row in methods
    ]
