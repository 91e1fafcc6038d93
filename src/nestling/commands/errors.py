"""``nestling evaluate --errors``: labels that are probably wrong, among rows that the model was not trained on."""

from __future__ import annotations

import ast
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nestling.bundle import Bundle
from nestling.commands.choose import IN_TIME, in_time
from nestling.commands.memory import as_planned
from nestling.commands.reading import own_source
from nestling.commands.rivals import RATE
from nestling.commands.train import say
from nestling.config import apply, load_toml, read_config, to_dict
from nestling.data.dataset import LabelledData
from nestling.data.fingerprint import fingerprint
from nestling.data.hold_out import hold_out
from nestling.data.sources import has_column, has_split, load_data
from nestling.data.split import assign, cut_parts, one_of_each_group, strata
from nestling.data.text import AnyPreprocessing, beginning, loaded_for
from nestling.engine.fit import fit
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.evaluate.measure import CLEAN, outputs_of
from nestling.evaluate.mistakes import Mistake, label_mistakes
from nestling.methods import recipe_class
from nestling.methods.layerwise import Layerwise
from nestling.methods.recipe import Recipe
from nestling.models.model import Model
from nestling.report.mistakes import Suspect, render_mistakes
from nestling.taxonomy import Taxonomy

if TYPE_CHECKING:
    from nestling.options import Evaluate

SHOWN, PICTURED = 10, 100
"""Of each level, printed and put on the page; the JSON has all."""


@dataclass(frozen=True, eq=False)
class Judged:
    """Rows with what a model that was not trained on them makes of them."""

    data: LabelledData
    probabilities: dict[str, np.ndarray]


class Doubts:
    """The labels of some rows that are probably wrong."""

    def __init__(self, parts: Sequence[Judged], taxonomy: Taxonomy) -> None:
        self.parts, self.taxonomy = parts, taxonomy
        self.ends = np.cumsum([len(part.data) for part in parts])
        levels = list(parts[0].probabilities)
        labels = np.concatenate([part.data.labels for part in parts])
        joined = {level: np.concatenate([part.probabilities[level] for part in parts]) for level in levels}
        self.found = label_mistakes(joined, labels, taxonomy)
        self.counts = {level: int((labels[:, taxonomy.level_index(level)] >= 0).sum()) for level in levels}

    def place(self, row: int) -> tuple[LabelledData, int]:
        """The data of a row, and its number there."""
        part = int(np.searchsorted(self.ends, row, "right"))
        return self.parts[part].data, row - (int(self.ends[part - 1]) if part else 0)

    def names(self, mistake: Mistake) -> tuple[str, str]:
        """The paths, coarse to fine, that the label gives and that is suggested."""
        return tuple(self._path(mistake.level, code) for code in (mistake.given, mistake.suggested))  # type: ignore[return-value]

    def _path(self, level: str, code: int) -> str:
        above = self.taxonomy.levels[: self.taxonomy.level_index(level) + 1]
        return " > ".join(
            self.taxonomy.classes[name][int(self.taxonomy.ancestor(name, of=level)[code])] for name in above
        )

    def entries(self) -> list[dict[str, Any]]:
        """The entry ``errors``: ``item``, ``level``, ``given``, ``suggested`` and ``score`` of each."""
        result = []
        for level, mistakes in self.found.items():
            classes = self.taxonomy.classes[level]
            for mistake in mistakes:
                data, row = self.place(mistake.row)
                entry = {"item": printable(data.items[row]), "level": level, "given": classes[mistake.given]}
                result.append(entry | {"suggested": classes[mistake.suggested], "score": mistake.score})
        return result

    def lines(self) -> list[str]:
        """The surest of each level in words."""
        lines = []
        for level, mistakes in self.found.items():
            lines.append(f"{level}: {len(mistakes):,} of {self.counts[level]:,} labels are probably wrong")
            for mistake in mistakes[:SHOWN]:
                data, row = self.place(mistake.row)
                given, suggested = self.names(mistake)
                said = f"  {beginning(data.inputs[row])}" if isinstance(data.inputs, list) else ""
                lines.append(f"  +{mistake.score:.2f}  {printable(data.items[row])}: {given}, rather {suggested}{said}")
            if len(mistakes) > SHOWN:
                lines.append(f"  and {len(mistakes) - SHOWN:,} more: --json FILE lists them")
        return lines

    def page(self, title: str) -> str:
        """The same with thumbnails, as HTML."""
        levels = {level: [self._suspect(m) for m in found[:PICTURED]] for level, found in self.found.items() if found}
        return render_mistakes(title, levels, self.counts)

    def _suspect(self, mistake: Mistake) -> Suspect:
        data, row = self.place(mistake.row)
        given, suggested = self.names(mistake)
        texts = isinstance(data.inputs, list)
        image = None if texts else data.images(np.array([row]))[0].cpu().numpy()
        text = beginning(data.inputs[row]) if isinstance(data.inputs, list) else ""
        return Suspect(image, printable(data.items[row]), given, suggested, mistake.score, text)


def doubts(command: Evaluate, bundle: Bundle, test: LabelledData, runtime: Runtime) -> Doubts:
    """The labels of ``test`` that are probably wrong, and of the other rows of the run's source that it was not trained
    on; with ``--folds`` of all its training rows."""
    parts = [test]
    if command.folds is not None:
        if command.folds < 2:
            raise UsageError(f"--folds must be at least 2, got {command.folds}")
        train = training_rows(command, bundle)
        return Doubts(folds(command, bundle, train, runtime), bundle.model.taxonomy)
    if command.source is None and command.split == "test":
        parts += held_rows(training_rows(command, bundle), command, bundle)
    return Doubts(
        [Judged(data, probabilities(bundle.model, bundle.preprocessing, data, runtime)) for data in parts],
        bundle.model.taxonomy,
    )


def training_rows(command: Evaluate, bundle: Bundle) -> LabelledData:
    """The rows of the run's own training split, as it was given them."""
    return _load(command, bundle, "train")


def _load(command: Evaluate, bundle: Bundle, split: str) -> LabelledData:
    config, source = bundle.config, command.source or own_source(command.run, bundle)
    if not source:
        raise UsageError(f"{command.run} does not say what it was trained on, whose rows are asked for: give --source")
    data = load_data(
        source,
        split,
        command.data_dir,
        bundle.tree,
        config.get("levels"),
        **loaded_for(bundle.preprocessing),
        qualify_names=command.qualify_names,
        on_bad_image=command.on_bad_image or "error",
        seed=config.get("seed", 0),
        concepts=concept_column(bundle, source, command.data_dir),
        sides=bundle.sides,
    )
    if config.get("hold_out") is not None:
        data, _ = hold_out(data, config["hold_out"]["classes"])
    return data.keep(config["known"], config.get("seed", 0)) if config.get("known") else data


def concept_column(bundle: Bundle, source: str, data_dir: str | None) -> str | None:
    """The column of the concepts that a model was trained by; None where they are a level, or the source has it not."""
    concepts = bundle.config.get("concepts", {})
    return concepts["level"] if concepts.get("column") and has_column(source, concepts["level"], data_dir) else None


def held_rows(train: LabelledData, command: Evaluate, bundle: Bundle) -> list[LabelledData]:
    """The validation and calibration rows, where the cut of ``train`` is that which the run made."""
    own = has_split(own_source(command.run, bundle) or "", "validation", command.data_dir)
    validation = _load(command, bundle, "validation") if own else None
    _, validation, calibration = cut_parts(train, validation, bundle.config.get("seed", 0))
    scores = bundle.scores.get("calibration")
    counted = one_of_each_group(calibration)
    assert counted is not None
    columns = train.taxonomy.columns(counted.labels)
    if scores is None or not np.array_equal(columns[:, : len(scores.levels)], scores.labels):
        say("the training split has changed since, or was used whole: test rows alone are judged")
        return []
    return [part for part in (validation, calibration) if len(part)]


def folds(command: Evaluate, bundle: Bundle, train: LabelledData, runtime: Runtime) -> list[Judged]:
    """Every row of ``train``, each judged by a model that the run's recipe trained on the other folds."""
    run, count = Path(command.run), command.folds
    assert count is not None
    if not (run / "recipe.toml").is_file():
        raise UsageError(f"--folds trains anew by {run / 'recipe.toml'}, which is not there: give the run folder")
    given = read_config(run / "recipe.toml")
    chosen = load_toml(run / "recipe.toml").get("derived", {})
    derived = {name: entry["value"] for name, entry in chosen.items()}
    for name in ("init", "weights"):
        if given.get(name):
            raise UsageError(f"--folds trains anew, from fresh weights, and this run began from --{name} {given[name]}")
    recipe = recipe_of(given, derived)
    # Corrected labels are other rows to train on, and other settings another training.
    told = json.dumps([fingerprint([train]), to_dict(recipe)], sort_keys=True, default=str)
    made_of = hashlib.sha256(told.encode()).hexdigest()[:8]
    seed, result = int(given.get("seed", 0)), []
    part = assign(strata(train.labels, train.taxonomy), [1 / count] * count, seed, train.groups)
    for number in range(count):
        say(f"--- fold {number + 1} of {count}")
        trained = fit(
            recipe,
            train.subset(part != number),
            out=run / "folds" / f"{number + 1}-of-{count}-{made_of}",
            seed=seed,
            device=command.device,
            precision=derived.get("precision", given.get("precision", "auto")),
            backbone=given.get("backbone", "auto"),
        )
        rows = train.subset(part == number)
        result.append(Judged(rows, probabilities(trained.model, trained.preprocessing, rows, runtime)))
    return [judged for judged in result if len(judged.data)]


def recipe_of(given: Mapping[str, Any], derived: Mapping[str, Any]) -> Recipe:
    """The recipe that a run was trained by: its ``[given]``, and of its ``[derived]`` the learning rate that baselines
    were compared at, the epochs that fit its minutes, and the plan that fits its memory."""
    method = str(given.get("method"))
    recipe = recipe_class(method)()
    names = {field.name for field in fields(recipe)}
    recipe = apply(recipe, {name: value for name, value in given.items() if name in names})
    rate = derived.get(RATE.format(method))
    if rate is not None:
        recipe = replace(recipe, optimizer=replace(recipe.optimizer, lr=ast.literal_eval(rate)))
    if IN_TIME in derived:
        recipe = in_time(recipe, derived[IN_TIME])
    return (as_planned(recipe, derived.get) or recipe) if isinstance(recipe, Layerwise) else recipe


@torch.no_grad()
def probabilities(
    model: Model, preprocessing: AnyPreprocessing, data: LabelledData, runtime: Runtime
) -> dict[str, np.ndarray]:
    """The combined probabilities (n, width) of every level that the model answers at."""
    answers = model.answers(outputs_of(model, preprocessing, data, runtime)[CLEAN])
    return {level: p.double().cpu().numpy() for level, p in answers.combined.items()}


def printable(name: str) -> str:
    """A name in one line of UTF-8."""
    return " ".join(name.encode("utf-8", "backslashreplace").decode().split())
