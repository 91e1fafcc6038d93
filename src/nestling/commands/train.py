"""``nestling train``: from a source to a calibrated model with its figures and report, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.config import merge, parse_assignments, read_config
from nestling.engine.runfolder import RunFolder
from nestling.errors import UsageError

if TYPE_CHECKING:
    from nestling.cli import Train

OPTIONS = (
    "source",
    "method",
    "seed",
    "known",
    "backbone",
    "image_size",
    "levels",
    "taxonomy",
    "qualify_names",
    "on_bad_image",
    "baselines",
)
"""Options that decide what is learned: they stand in ``[given]`` beside the fields, and may stand in a configuration."""


def train(command: Train) -> int:
    """Run the command. Everything is checked before anything is written."""
    options, fields = settings(command)
    digest = hashlib.sha256(json.dumps([options, fields], sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(options["source"]).stem) or "source"
    out = Path(command.out or f"runs/{name}-{options['method']}-{digest}")
    with RunFolder(out) as folder:
        from nestling.commands.pipeline import Pipeline

        pipeline = Pipeline(
            folder, options, fields, data_dir=command.data_dir, device=command.device, precision=command.precision
        )
        pipeline.run()
    print(out)
    return 0


def settings(command: Train) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and fields after defaults < --config < --set and options."""
    config = read_config(command.config) if command.config else {}
    options: dict[str, Any] = {"method": "nested", "seed": 0, "known": {}, "backbone": "auto"}
    options |= {name: config.pop(name) for name in OPTIONS if name in config}
    given = {name: getattr(command, name) for name in OPTIONS}
    given["known"] = parse_known(command.known) if command.known else None
    given["levels"] = list(command.level_names) if command.level_names else None
    defaults = {"qualify_names": False, "on_bad_image": "error", "baselines": False}
    options |= {name: value for name, value in given.items() if value is not None and value != defaults.get(name)}
    if not options.get("source"):
        raise UsageError(
            "train needs a SOURCE: a catalogue name such as digits, a folder tree, a CSV or Parquet file, or hf:owner/name"
        )
    if isinstance(options["known"], str):
        options["known"] = parse_known(options["known"])
    if not isinstance(options["seed"], int) or options["seed"] < 0:
        raise UsageError(f"seed must be an integer of at least 0, got {options['seed']!r}")
    return options, merge(config, parse_assignments(command.set))


def parse_known(text: str) -> dict[str, float]:
    """``coarse=1.0,fine=0.1`` to numbers. Raises UsageError."""
    known = {}
    for part in text.split(","):
        level, equals, value = part.partition("=")
        try:
            known[level.strip()] = float(value)
        except ValueError:
            equals = ""
        if not equals or not level.strip():
            raise UsageError(
                f"cannot read --known {text!r}: expected level=fraction, such as coarse=1.0,middle=0.4,fine=0.1"
            )
    return known


def say(text: str) -> None:
    """A line on stderr; stdout carries results alone."""
    print(text, file=sys.stderr, flush=True)
