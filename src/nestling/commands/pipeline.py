"""Source to finished run: load, train (with baselines if asked), evaluate, write figures, bundle and report.

Each step reads back what an earlier, interrupted call of the same command finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nestling.bundle import save_bundle
from nestling.commands.train import say
from nestling.config import apply, to_dict
from nestling.data.dataset import LabelledData
from nestling.data.sources import has_split, load_data
from nestling.engine.fit import Run, cut_rows, fit
from nestling.engine.plan import num_steps
from nestling.engine.runfolder import RunFolder
from nestling.engine.runtime import Runtime
from nestling.errors import DataError, UsageError
from nestling.evaluate.compare import compare, verdict
from nestling.evaluate.measure import Measurement, measure, outputs_of
from nestling.files import write_bytes, write_json, write_text
from nestling.methods import recipe_class
from nestling.methods.baselines import EndToEnd, FlatMarginal
from nestling.methods.recipe import Recipe
from nestling.provenance import provenance
from nestling.report import render, render_card
from nestling.report.gather import gather
from nestling.taxonomy import Taxonomy

RATES = (1e-3, 3e-3, 1e-2)
"""The learning rates that every method chooses from on validation rows, with --baselines."""
FINISHED = "report.html"
"""Written last: a run folder that holds it is finished."""


class Pipeline:
    """``train``'s work on one run folder, whose lock is held."""

    def __init__(self, folder: RunFolder, options: Mapping[str, Any], fields: Mapping[str, Any], data_dir: str | None,
                 device: str, precision: str) -> None:
        self.folder, self.options, self.device, self.precision = folder, dict(options), device, precision
        self.recipe: Recipe = apply(recipe_class(options["method"])(), fields)
        self.rate_given = "lr" in fields.get("optimizer", {})
        given = {k: v for k, v in self.options.items() if v != {}} | to_dict(self.recipe)
        if precision != "auto":
            given["precision"] = precision
        self.begun = folder.open(given)
        self.data_dir = data_dir

    def run(self) -> None:
        """Do what is left to do."""
        if self.begun and (self.folder.path / FINISHED).exists():
            say(f"{self.folder.path} is finished; nestling show {self.folder.path} prints it")
            return
        began = time.monotonic()
        data, validation = self.load("train"), self.validation()
        Runtime.choose(self.device, self.precision)
        runs, measurements, test = {}, {}, None
        run = self.fit(self.recipe, data, validation, None)
        if not self.options.get("baselines"):
            runs[self.recipe.method] = run
        del run
