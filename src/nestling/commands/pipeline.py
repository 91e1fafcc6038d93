"""Source to finished run: load, train (with baselines if asked), and finish.

Each step reads back what an earlier, interrupted call of the same command finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from nestling import collective
from nestling.commands.choose import Choice, cut_short, keep_to
from nestling.commands.figures import figure_lines
from nestling.commands.finish import Finish, default_distortions, finish
from nestling.commands.init import begin, shared_rows
from nestling.commands.notes import idle_lines, notes_of, overconfident, unweighted
from nestling.commands.reading import PLACE
from nestling.commands.rivals import rivals, train_rivals
from nestling.commands.source_rows import SourceRows
from nestling.commands.train import say
from nestling.commands.words import program, score_lines
from nestling.config import apply, to_dict
from nestling.data.dataset import LabelledData
from nestling.data.fingerprint import fingerprint
from nestling.data.resolve import place_of
from nestling.data.text import holds_texts
from nestling.engine.fit import cut_rows, fit
from nestling.engine.plan import StagePlan, plan
from nestling.engine.run import Run
from nestling.engine.runfolder import RunFolder
from nestling.engine.runtime import Runtime, seeded
from nestling.errors import StorageError, UsageError
from nestling.evaluate.concepts import rows_of_concepts
from nestling.methods import recipe_class
from nestling.methods.layerwise import Layerwise
from nestling.methods.recipe import Recipe
from nestling.models.build import SearchOptions
from nestling.models.model import Model
from nestling.seeds import derive


class Pipeline:
    """``train``'s work on one run folder, whose lock is held."""

    def __init__(
        self,
        folder: RunFolder,
        options: Mapping[str, Any],
        fields: Mapping[str, Any],
        data_dir: str | None,
        device: str,
        workers: int | None = None,
        compile: bool = False,
    ) -> None:
        self.folder, self.options, self.data_dir, self.device = folder, dict(options), data_dir, device
        self.workers, self.compile = workers, compile
        self.deadline: float | None = None
        self.cut_short = ""
        """What there is to warn of where --minutes leaves few steps."""
        self.recipe: Recipe = apply(recipe_class(options["method"])(), fields)
        for line in idle_lines(self.recipe, fields):
            say(line)
        self.rows = SourceRows(self.options, data_dir)
        self.rate_given = "lr" in fields.get("optimizer", {})
        self.source, self.seed, self.backbone = options["source"], options["seed"], options["backbone"]
        given = {name: value for name, value in options.items() if value not in ({}, "auto")} | to_dict(self.recipe)
        if options.get("baselines") and not self.rate_given:
            # It is chosen, and a configuration that named it would be taken as giving it.
            del given["optimizer"]["lr"]
        precision = options.get("precision", "auto")
        Runtime.choose(device, precision, workers=workers)
        self.begun = folder.open(given, collective.broadcast_object)
        self.precision = precision

    def run(self, deadline: float | None = None, chosen: Sequence[Choice] = ()) -> None:
        """Do what is left to do, the training before ``deadline``; ``chosen`` is what was chosen before."""
        self.deadline = deadline
        began = time.monotonic()
        if self.folder.finished:
            self.recognise_if_there()
            say(f"{self.folder.path} is finished: {program()} show {self.folder.path} prints it")
            return
        train, validation, test = self.rows.load_all()
        self.within_memory(train, validation)
        stages = self.check(train, validation)
        for choice in chosen:
            say(choice.line)
            self.folder.derive(*choice)
        stages = self.within_minutes(train, validation, stages)
        self.recognise(train, validation, test)
        if (place := place_of(str(self.source))) != self.source:
            self.folder.derive(PLACE, place, "where it lay")
        notes = self.notes(train, validation, test)
        for note in notes:
            say(note)
        runs = (
            train_rivals(self, train, validation, stages)
            if self.options.get("baselines")
            else {self.recipe.method: self.fit(self.recipe, train, validation, self.folder)}
        )
        if collective.rank() > 0:
            return
        kept = ("known", "levels", "image_size", "init", "on_bad_image", "qualify_names")
        about = {name: self.options[name] for name in kept if self.options.get(name)}
        about |= {"levels": levels} if (levels := self.rows.levels(train)) else {}
        if self.rows.held_out is not None and self.rows.tree is not None:
            about["hold_out"] = {"classes": self.options["hold_out"], "taxonomy": self.rows.tree.to_dict()}
        concepts = self.recipe.concepts_at(train)
        if concepts is None and train.concepts is not None:
            concepts = train.concepts.name
        if concepts is not None:
            rows = rows_of_concepts(train, concepts)
            about["concepts"] = {"level": concepts, "rows": rows, "column": concepts not in train.taxonomy.levels}
        end = Finish(
            folder=self.folder,
            method=self.recipe.method,
            runs={name: [run] for name, run in runs.items()},
            seeds=[self.seed],
            test=test,
            train=train,
            held_out=self.rows.held_out,
            source=str(self.source),
            device=self.device,
            workers=self.workers,
            about=about,
            sides=self.rows.sides(*([] if self.rows.earlier is None else [self.rows.earlier.train])),
            notes=notes,
            caveat=f"With more time it may come out otherwise: {self.cut_short}." if self.cut_short else "",
            began=began,
        )
        size = runs[self.recipe.method].preprocessing
        metrics = finish(end, [] if holds_texts(test) else default_distortions(min(size.height, size.width)))
        for line in (*score_lines({"": metrics["levels"]}), *figure_lines(metrics), *overconfident(metrics["levels"])):
            say(line)
        if "verdict" in metrics:
            say(metrics["verdict"])
        elif not isinstance(self.recipe.network(), SearchOptions):
            say("whether this beats flat training is not measured here: the same command with --baselines says it")

    def notes(self, train: LabelledData, validation: LabelledData | None, test: LabelledData) -> list[str]:
        """What there is to say before the training."""
        notes = notes_of(train, validation, test) + self.recipe.remarks(train)
        notes += unweighted(train, self.recipe.concepts_at(train))
        if self.options.get("init"):
            notes += shared_rows(self.options["init"], self.rows.earlier, self.rows.sides())
        return [*notes, *([f"warning: {self.cut_short}"] if self.cut_short else [])]

    def recognise(self, *parts: LabelledData | None) -> None:
        """Keep a hash of all rows. Raises DataError where the run was begun with others."""
        found = fingerprint(part for part in parts if part is not None)
        self.folder.recognise("data", found, "the hash of all rows, by which a resume knows them again")

    def recognise_if_there(self) -> None:
        """The same for a finished run, whose rows need not lie there any more."""
        try:
            parts = self.rows.load_all()
        except (UsageError, StorageError):
            return
        self.recognise(*parts)

    def check(
        self, train: LabelledData, validation: LabelledData | None, recipe: Recipe | None = None
    ) -> list[StagePlan]:
        """What the recipe will do with these rows. Raises whatever it cannot do, before anything is said or written."""
        recipe = recipe or self.recipe
        # A plan is made of labels; the images need not be copied for it.
        labels = replace(train, inputs=torch.empty((len(train), 1, 1, 1), dtype=torch.uint8))
        rows, _ = cut_rows(labels, validation, self.seed)
        with torch.device("meta"):
            model = self.build(train, recipe)
        return plan(recipe, model, rows)

    def within_memory(self, train: LabelledData, validation: LabelledData | None) -> None:
        """With ``--memory``, choose how the layers are trained; a resume keeps what was chosen."""
        if not self.options.get("memory"):
            return
        from nestling.commands.memory import FIELDS, as_planned, choose_plan, parse_memory

        budget = parse_memory(self.options["memory"])
        if not isinstance(self.recipe, Layerwise):
            raise UsageError("--memory chooses how many layers train together: add --method layerwise")
        planned = as_planned(self.recipe, self.folder.kept)
        if planned is not None:
            self.recipe = planned
            return
        rows, held = cut_rows(train, validation, self.seed)
        runtime = Runtime.choose(self.device, self.precision, self.folder.kept("precision"), 0)
        self.recipe, text, reason = choose_plan(
            self.recipe, lambda: self.build(train, self.recipe), rows, held, runtime, budget, self.folder.path
        )
        say(f"within {self.options['memory']}: {text} ({reason})")
        for name in FIELDS:
            self.folder.derive(name, getattr(self.recipe, name), f"for --memory {self.options['memory']}: {text}")

    def within_minutes(
        self, train: LabelledData, validation: LabelledData | None, stages: list[StagePlan]
    ) -> list[StagePlan]:
        """The stages, with ``--minutes`` of as many epochs as fit; a resume keeps what was chosen."""
        if self.deadline is None:
            return stages
        trainings = 1
        if self.options.get("baselines"):
            trainings = sum(map(len, rivals(self.recipe, self.rate_given, stages).values()))
        self.recipe = keep_to(self, train, validation, stages, trainings, self.deadline)
        planned = self.check(train, validation)
        self.cut_short = cut_short(stages, planned, self.options["minutes"], trainings)
        return planned

    def build(self, train: LabelledData, recipe: Recipe) -> Model:
        """The recipe's network, fresh, or on the backbone that ``--init`` or ``--weights`` names."""
        return begin(self.options, train, self.backbone, recipe)

    def fit(self, recipe: Recipe, train: LabelledData, validation: LabelledData | None, out: RunFolder | Path) -> Run:
        """Train, or go on, in ``out``."""
        model = None
        if self.options.get("init") or self.options.get("weights"):
            with seeded(derive(self.seed, "weights")):
                model = self.build(train, recipe)
        return fit(
            recipe,
            train,
            model,
            out,
            self.seed,
            self.device,
            self.precision,
            validation=validation,
            backbone=self.backbone,
            workers=self.workers,
            compile=self.compile,
            # A rival that comes last must not be the one that is cut short.
            deadline=None if self.options.get("baselines") else self.deadline,
        )
