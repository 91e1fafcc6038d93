"""What ``nestling train`` chooses from the data: the method where none is named, and epochs that keep to a time."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nestling import collective
from nestling.commands.train import say
from nestling.config import apply, load_toml
from nestling.data.dataset import LabelledData
from nestling.data.sources import load_labels
from nestling.engine.estimate import estimate
from nestling.engine.fit import cut_rows
from nestling.engine.plan import StagePlan
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.methods import recipe_class
from nestling.methods.choose import Seen, choose_epochs, choose_method, fields_with, within
from nestling.methods.recipe import Recipe

if TYPE_CHECKING:
    from nestling.commands.pipeline import Pipeline
    from nestling.options import Train

TRAINING_SHARE = 0.8
"""Of the minutes; the rest is for the figures of the test rows and the report."""
HALF = 0.5
"""Of the steps wanted; a training of fewer is warned of."""
IN_TIME = "epochs in time"
"""Among what a run has derived."""


class Choice(NamedTuple):
    """Something that was chosen: name, value, and why."""

    name: str
    value: str
    reason: str

    @property
    def line(self) -> str:
        """As it is printed."""
        return f"{self.name}: {self.value} ({self.reason})"


def choose(
    command: Train, options: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any], list[Choice]]:
    """Options and fields with a method in them, and what was chosen. A run that was begun keeps its method."""
    given = _given(command.out)
    begun = given.get("method")
    if begun is not None and given.get("source") != options["source"]:
        # Another run stands there, which the folder will say.
        return {**options, "method": begun}, dict(fields), []
    data = load_labels(
        options["source"],
        "train",
        command.data_dir,
        options.get("taxonomy"),
        options.get("levels"),
        qualify_names=options.get("qualify_names", False),
        seed=options["seed"],
        concepts=options.get("concepts"),
    )
    if options.get("known"):
        data = data.keep(options["known"], options["seed"])
    counts = (data.labels >= 0).sum(axis=0).tolist()
    # Levels that were named, and that no row is labelled at yet: of the taxonomy there are only those with classes.
    to_come = [level for level in options.get("levels", ()) if level not in data.taxonomy.levels]
    seen = Seen(
        levels=(*data.taxonomy.levels, *to_come),
        known=[*counts, *(0 for _ in to_come)],
        memory=bool(options.get("memory")),
        mix="prior" in fields,
    )
    method, more, reason = choose_method(seen)
    if begun is not None:
        method, more = begun, more if begun == method else {}
    kind = recipe_class(method)
    rows, _ = cut_rows(data, None, options["seed"])
    epochs, why = choose_epochs(method, len(rows), len(data.taxonomy.levels))
    if epochs is not None:
        more = {**more, "epochs": epochs}
    fields = fields_with(fields, more)
    if begun is not None:
        return {**options, "method": method}, fields, []
    chosen = [Choice("method", method, reason)]
    recipe: Recipe = apply(kind(), fields)
    if "epochs" in more and fields["epochs"] == more["epochs"]:
        chosen.append(Choice("epochs", str(epochs), why))
    if recipe.batch_size is None:
        batch = recipe.batch_for(len(rows))
        chosen.append(Choice("batch_size", str(batch), f"for {len(rows):,} training rows: a tenth, 32 to 256"))
    return {**options, "method": method}, fields, chosen


def _given(out: str | None) -> dict[str, Any]:
    """The settings of the run that stands in the folder already; none where there is no run, or no place for one."""
    path = Path(out or "", "recipe.toml")
    try:
        found = load_toml(path).get("given", {}) if out is not None and path.is_file() else {}
    except OSError:
        return {}
    return found if isinstance(found.get("method"), str) else {}


def deadline_of(minutes: float | None, began: float) -> float | None:
    """The moment of ``time.monotonic()`` at which training has to end. Raises UsageError."""
    if minutes is None:
        return None
    if not (math.isfinite(minutes) and minutes > 0):
        raise UsageError(f"--minutes must be above 0, got {minutes:g}")
    return began + 60 * TRAINING_SHARE * minutes


def keep_to(
    pipeline: Pipeline,
    train: LabelledData,
    validation: LabelledData | None,
    stages: Sequence[StagePlan],
    trainings: int,
    deadline: float,
) -> Recipe:
    """The recipe with as many epochs as fit before ``deadline``; said, and kept for a resume.

    ``trainings``: how many share the time.
    """
    folder = pipeline.folder
    found = folder.kept(IN_TIME)
    if found is None:
        recipe, text, reason = collective.broadcast_object(
            fitted(pipeline, train, validation, stages, trainings, deadline)
        )
        found = json.dumps({"epochs": recipe.epochs, "steps_per_epoch": recipe.steps_per_epoch})
        say(f"within the minutes: {text} ({reason})")
        folder.derive(IN_TIME, found, f"for --minutes: {text}; {reason}")
    return in_time(pipeline.recipe, found)


def cut_short(wanted: Sequence[StagePlan], planned: Sequence[StagePlan], minutes: float, trainings: int) -> str:
    """What to warn of where less than half of the steps that a recipe wants fit into the minutes, else nothing."""
    before, after = (sum(stage.steps for stage in stages if stage.follows) for stages in (wanted, planned))
    if after >= HALF * before:
        return ""
    each = f" for each of {trainings} trainings" if trainings > 1 else ""
    return (
        f"{after:,} of {before:,} steps fit into --minutes {minutes:g}{each}: the answers are worse than they could "
        f"be; about {math.ceil(minutes * before / max(after, 1)):,} minutes would do"
    )


def in_time(recipe: Recipe, found: str) -> Recipe:
    """The recipe with the epochs that a run folder keeps as ``IN_TIME``."""
    kept = json.loads(found)
    epochs = tuple(kept["epochs"]) if isinstance(kept["epochs"], list) else kept["epochs"]
    return replace(recipe, epochs=epochs, steps_per_epoch=kept["steps_per_epoch"])


def fitted(
    pipeline: Pipeline,
    train: LabelledData,
    validation: LabelledData | None,
    stages: Sequence[StagePlan],
    trainings: int,
    deadline: float,
) -> tuple[Recipe, str, str]:
    """The recipe, its epochs in words, and why: a few steps of every stage are timed."""
    recipe = pipeline.recipe
    rows, held = cut_rows(train, validation, pipeline.seed)
    runtime = Runtime.choose(pipeline.device, pipeline.precision, pipeline.folder.kept("precision"), pipeline.workers)
    found = estimate(recipe, pipeline.build(train, recipe), rows, held, runtime, steps=2, folder=pipeline.folder.path)
    left = max(deadline - time.monotonic(), 0.0) / trainings
    wanted = [
        (stage.epochs, max(stage.steps // max(stage.epochs, 1), 1), one.seconds)
        for stage, one in zip(stages, found, strict=True)
    ]
    fixed = sum(seconds for (_, _, seconds), stage in zip(wanted, stages, strict=True) if not stage.follows)
    moving = [number for number, stage in enumerate(stages) if stage.follows]
    epochs, steps = within([wanted[number] for number in moving], left - fixed)
    total = sum(seconds for _, _, seconds in wanted)
    reason = f"{total:.0f} s as wanted, {left:.0f} s left for it, measured by a few steps of each stage"
    if steps is None and all(e == wanted[number][0] for e, number in zip(epochs, moving, strict=True)):
        return recipe, "as wanted", reason
    several = len(set(epochs)) > 1 and recipe.method == "nested"
    changed = replace(
        recipe, epochs=epochs if several else min(epochs), steps_per_epoch=steps or recipe.steps_per_epoch
    )
    text = f"{', '.join(map(str, epochs if several else [min(epochs)]))} epochs"
    return changed, text + (f" of {steps} steps" if steps else ""), reason
