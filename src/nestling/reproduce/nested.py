"""What the nested tables share: the authors' networks and rates, recipes and label mixes at every scale, trials.

*Nested Learning for Multi-Level Classification*, Achddou, Di Martino, Sapiro, 2021. Every method of a table has
the same network, the same rows as far as it may see them, the same batches, temperature step and number of steps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from nestling.methods.baselines import EndToEnd, FlatMarginal
from nestling.methods.nested import Nested
from nestling.methods.recipe import Optimizer, Recipe
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Place, Trial

Measure = Callable[[Trial, Place], list[Cell]]
Mix = tuple[int, ...]
Flat = EndToEnd | FlatMarginal

NESTED, OURS, TWIN, MORE = "nested", "nested, our default", "end-to-end", "end-to-end, 1.5 f"
MARGINAL, CRM = "flat + marginal", "flat + CRM"
"""The rows of a table. ``MORE`` has half as many fine labels again; ``CRM`` decides anew from ``MARGINAL``'s weights,
and is measured beside it."""

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
    num_rows: int
    """n of the label mix."""
    network: Network
    epochs: Mix
    """Of the stages of the cascade."""
    test: int | None

    def rows(self, known: Mix | None = None, *, fine_only: bool = False) -> Rows:
        """The label mix (coarse only, up to middle, all labels), by default that of the authors' rates."""
        mix = self.mix() if known is None else known
        return Rows(
            source=self.source, train=self.num_rows, test=self.test, known=mix, fine_only=fine_only, validation=KEPT
        )

    def mix(self, rates: tuple[float, float, float] = RATES) -> Mix:
        """How many rows are labelled up to each level exactly, of rates at least so far."""
        coarse, middle, fine = (round(rate * self.num_rows) for rate in rates)
        return coarse - middle, middle - fine, fine


SIZES: Mapping[str, Mapping[str, tuple[int, Network, Mix, int | None]]] = {
    "smoke": {
        "mnist": (120, Network(backbone="conv:2-2/4/4-8"), (1, 1, 1), 60),
        "fashion_mnist": (120, Network(backbone="conv:2-2/4/4-8"), (1, 1, 1), 60),
        "cifar10": (120, Network(backbone="conv:4/4/4/4", hidden=(8, 4, 0), dropout=0.3), (1, 1, 1), 60),
    },
    "small": {
        "mnist": (6_000, MNIST, (30, 30, 80), 4_000),
        "fashion_mnist": (6_000, MNIST, (30, 30, 80), 4_000),
        "cifar10": (6_000, HALF_CIFAR10, (15, 15, 30), 4_000),
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
    return Setting(source=source, num_rows=num_rows, network=network, epochs=epochs, test=test)


def nested(scale: str, network: Network, epochs: Mix, **more: Any) -> Nested:
    """The paper's cascade on disjoint subsets; ``more`` are other fields of the recipe."""
    if scale == "smoke":
        more["rejection_epochs"] = 1
    made = Nested(
        reading="exact",
        marginal=False,
        balance="rows",
        augmentation="none",
        epochs=epochs,
        hidden=network.hidden,
        dropout=network.dropout,
        **budget(scale, len(epochs)),
    )
    return replace(made, **more)


def flat(
    scale: str, kind: type[EndToEnd] | type[FlatMarginal], network: Network, epochs: Mix, steps: int | None, **more: Any
) -> Flat:
    """A baseline on the same network, with as many steps as the cascade has in all: ``steps``."""
    made = kind(
        balance="levels",
        augmentation="none",
        epochs=epochs[-1],
        hidden=network.hidden,
        dropout=network.dropout,
        **budget(scale, 1),
    )
    return replace(made, **paced(scale, steps, epochs[-1]), **more)


def budget(scale: str, stages: int) -> dict[str, Any]:
    """Optimiser, batches and when to stop, by scale; the authors' rates of the last stages where there are fewer."""
    if scale == "paper":
        rates = {1: PAPER_RATES[-1:], 2: PAPER_RATES[::2], 3: PAPER_RATES}[stages]
        return {"optimizer": replace(PAPER_OPTIMIZER, lr=rates), "batch_size": 32, "patience": 10}
    if scale == "smoke":
        return {"optimizer": SMALL_OPTIMIZER, "batch_size": 16, "steps_per_epoch": 1}
    return {"optimizer": SMALL_OPTIMIZER, "batch_size": SMALL_BATCH}


def paced(scale: str, steps: int, epochs: int) -> dict[str, Any]:
    """Steps of an epoch such that all are ``steps``; at the paper's scale the paper's rule says when to stop."""
    return {"steps_per_epoch": max(-(-steps // epochs), 1)} if scale == "small" else {}


def steps_of(known: Mix, epochs: Mix) -> int:
    """Of the whole cascade at the small scale: a pass over the rows of each stage that are not kept, an epoch."""
    return sum(-(-int((1 - KEPT) * count) // SMALL_BATCH) * passes for count, passes in zip(known, epochs, strict=True))


def recipes(scale: str, network: Network, epochs: Mix, known: Mix) -> dict[str, Recipe]:
    """Every method by its row. ``known``: the label mix, which says how many steps all of them take."""
    steps = steps_of(known, epochs)
    default: dict[str, Any] = {"reading": "at-least", "marginal": True, "balance": "levels"}
    return {
        NESTED: nested(scale, network, epochs, calibration="both"),
        OURS: nested(scale, network, epochs, **default, **paced(scale, steps, sum(epochs))),
        TWIN: flat(scale, EndToEnd, network, epochs, steps),
        MORE: flat(scale, EndToEnd, network, epochs, steps),
        MARGINAL: flat(scale, FlatMarginal, network, epochs, steps),
    }


def rows_for(row: str, at: Setting, known: Mix | None = None) -> Rows:
    """What a method may see: the label mix, its fine labels alone, or half as many of those again."""
    mix = at.mix() if known is None else known
    if row == MORE:
        return at.rows((*(0,) * (len(mix) - 1), round(MORE_FINE * mix[-1])), fine_only=True)
    return at.rows(mix, fine_only=row == TWIN)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which methods are compared on a set, and how they are measured."""

    measure: Measure
    rows: tuple[str, ...] = (NESTED, OURS, TWIN, MORE, MARGINAL)
    options: Mapping[str, Any] = field(default_factory=dict)

    def trials(self, scale: str, source: str, prefix: str = "", known: Mix | None = None) -> list[Trial]:
        """One for each method; flat + CRM stands beside flat + marginal, which ``options['also']`` tells."""
        at = setting(scale, source)
        mix = at.mix() if known is None else known
        made = recipes(scale, at.network, at.epochs, mix)
        return [
            Trial(
                row=f"{prefix}{row}",
                recipe=made[row],
                rows=rows_for(row, at, mix),
                measure=self.measure,
                options={**self.options, **({"also": [f"{prefix}{CRM}"]} if row == MARGINAL else {})},
                backbone=at.network.backbone,
            )
            for row in self.rows
        ]
