"""``--memory 2GB``: how many layers train together, how many rows at once, and which maps are kept."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from nestling import collective
from nestling.commands.words import size
from nestling.data.dataset import LabelledData
from nestling.engine.estimate import Estimate, estimate
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.methods.layerwise import Layerwise
from nestling.models.layerwise import LayerwiseModel
from nestling.models.model import Model

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
FIELDS = ("together", "micro_batch", "recompute", "keep_features")
"""Of the recipe, which a budget chooses."""
LEAST_ROWS = 16
"""Of a micro-batch: with fewer, batch norm's statistics are noise."""


@dataclass(frozen=True)
class Plan:
    """A way to train the layers, and what one step of its largest stage was measured to need."""

    recipe: Layerwise
    memory: int
    """Bytes of tensors: parameters, optimiser state, kept features, and all that a step allocates at its peak."""
    seconds: float
    """Of training, estimated."""

    def text(self, layers: int) -> str:
        """In words."""
        together = min(self.recipe.together, layers)
        words = ["all layers together, end-to-end" if together == layers else f"{together} at a time"]
        words += [f"{self.recipe.micro_batch} rows at once"] * (self.recipe.micro_batch is not None)
        words += ["maps computed again on the way back"] * self.recipe.recompute
        words += ["features not kept"] * (not self.recipe.keep_features)
        return ", ".join(words)


def as_planned(recipe: Layerwise, kept: Callable[[str], Any]) -> Layerwise | None:
    """The recipe by the plan that a run was begun with; None where ``kept``, by name, has none."""
    found = {name: value for name in FIELDS if (value := kept(name)) is not None}
    # A run folder writes what is no number or truth as text.
    return replace(recipe, **{n: None if v == "None" else v for n, v in found.items()}) if found else None


def parse_memory(text: str) -> int:
    """``2GB`` or ``500 MiB`` as bytes. Raises UsageError."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) *([kmg]?i?b?)", text.strip().lower())
    if match is None or match[2] not in UNITS or float(match[1]) <= 0:
        raise UsageError(f"cannot read --memory {text!r}: give a size such as 2GB or 500MB")
    return int(float(match[1]) * UNITS[match[2]])


def choose_plan(
    recipe: Layerwise,
    build: Callable[[], Model],
    train: LabelledData,
    validation: LabelledData,
    runtime: Runtime,
    budget: int,
    folder: Path | None = None,
) -> tuple[Layerwise, str, str]:
    """The plan of most layers together that stays within ``budget`` bytes, the fastest of these; its text and reason.

    Fewer layers at a time learn less well (Belilovsky et al., Tables 1 and 2), so they are given up last. One step of
    each candidate is measured on every process, and the first one's figures count. ``folder`` is where the run will be.
    Raises UsageError where none fits, and says what would.
    """
    model = build()
    assert isinstance(model, LayerwiseModel)
    layers = len(model.blocks)
    least: Plan | None = None
    tried: list[str] = []
    for together in halved(layers):
        fitting: list[Plan] = []
        wanted = replace(recipe, together=together, micro_batch=None, recompute=False)
        for candidate in variants(wanted, recipe.batch_for(len(train)), recipe.keep_features and together < layers):
            found = collective.broadcast_object(measured(candidate, build(), train, validation, runtime, folder))
            least = found if least is None or found.memory < least.memory else least
            tried.append(f"{found.text(layers)}: {size(found.memory)}")
            if found.memory <= budget:
                fitting.append(found)
                if candidate == wanted:
                    break
        if fitting:
            best = min(fitting, key=lambda plan: plan.seconds)
            why = f"{size(best.memory)} of {size(budget)}; most layers together, then the fastest; " + "; ".join(tried)
            return best.recipe, best.text(layers), why
    assert least is not None
    raise UsageError(
        f"no plan fits into {size(budget)} of tensors: the least is {size(least.memory)} ({least.text(layers)}); raise "
        f"--memory to {size(least.memory)}, or lower width or --image-size"
    )


def halved(layers: int) -> Iterator[int]:
    """J, J / 2, … 1."""
    while layers > 1:
        yield layers
        layers = -(-layers // 2)
    yield 1


def variants(recipe: Layerwise, batch: int, keeps: bool) -> Iterator[Layerwise]:
    """The same layers at a time with ever smaller needs; the first is as wanted. ``keeps``: features can be."""
    rows: int | None = None
    while True:
        for recompute, features in product(
            (False, True), (recipe.keep_features, False) if keeps else (recipe.keep_features,)
        ):
            yield replace(recipe, micro_batch=rows, recompute=recompute, keep_features=features)
        if recipe.similarity:
            # It compares all rows of a batch.
            return
        rows = (rows or batch) // 2
        if rows < LEAST_ROWS:
            return


def measured(
    recipe: Layerwise,
    model: Model,
    train: LabelledData,
    validation: LabelledData,
    runtime: Runtime,
    folder: Path | None,
) -> Plan:
    """One step of every stage of a candidate; the largest decides."""
    found: list[Estimate] = estimate(recipe, model, train, validation, runtime, steps=1, folder=folder)
    return Plan(recipe, max(e.memory for e in found), sum(e.seconds for e in found))
