"""``nestling evaluate``: a trained model on labelled rows, clean and distorted."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING

from nestling.bundle import load_bundle
from nestling.commands.pipeline import describe
from nestling.data.distortions import parse_distortion
from nestling.data.sources import load_data
from nestling.engine.runtime import Runtime
from nestling.errors import DataError, UsageError
from nestling.evaluate.measure import measure, outputs_of
from nestling.files import write_json
from nestling.provenance import provenance

if TYPE_CHECKING:
    from nestling.cli import Evaluate


def evaluate(command: Evaluate) -> int:
    """Run the command."""
    began = time.monotonic()
    for spec in command.distort:
        parse_distortion(spec)
    bundle = load_bundle(command.run)
    runtime = Runtime.choose(command.device, "fp32")
    source = command.source or bundle.config.get("source")
    if not source:
        raise UsageError(f"{command.run} does not say what it was trained on: give --source")
    size = (bundle.preprocessing.height, bundle.preprocessing.width)
    levels = command.level_names or bundle.config.get("levels")
    data = load_data(
        source,
        command.split,
        command.data_dir,
        bundle.model.taxonomy,
        levels,
        image_size=size,
        channels=bundle.preprocessing.channels,
        qualify_names=command.qualify_names,
        on_bad_image=command.on_bad_image,
        seed=bundle.config.get("seed", 0),
    )
    if len(data) == 0 or not (data.labels >= 0).any():
        raise DataError(f"no row of {source}, split {command.split}, is labelled: there is nothing to score")
    measurement = measure(
        bundle.model, outputs_of(bundle.model, bundle.preprocessing, data, runtime, command.distort), data
    )
    method = bundle.model.config["method"]
    metrics = measurement.metrics | provenance(method, bundle.config.get("seed", 0), time.monotonic() - began)
    if command.json == "-":
        print(json.dumps(metrics, indent=1, allow_nan=False))
        return 0
    print(f"{method} on {source}, {command.split}: {len(data)} rows", file=sys.stdout)
    for level in metrics["levels"]:
        print("  " + describe(level))
    for name, found in metrics["distortions"].items():
        print(name)
        for level in found["levels"]:
            print("  " + describe(level))
    if command.json:
        write_json(command.json, metrics)
    return 0
