"""``nestling train``: from a source to a calibrated model with its figures and report, resumable at any moment."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.config import convert, merge, parse_assignments, read_config
from nestling.engine.runfolder import RunFolder
from nestling.errors import UsageError

if TYPE_CHECKING:
    from nestling.commands.choose import Choice
    from nestling.options import Train, TrainingOptions

OPTIONS: dict[str, Any] = {
    "source": str,
    "method": str,
    "seed": int,
    "known": dict,
    "backbone": str,
    "image_size": int,
    "init": str,
    "weights": str,
    "concepts": str,
    "levels": tuple[str, ...],
    "taxonomy": str,
    "qualify_names": bool,
    "on_bad_image": str,
    "baselines": bool,
    "precision": str,
    "memory": str,
    "hold_out": tuple[str, ...],
    "minutes": float,
}
"""Options that decide what is learned: they stand in ``[given]`` beside the fields, and may in a configuration."""
FLAGS = {"qualify_names": False, "baselines": False, "hold_out": ()}
AUTO = "auto"
"""The method is chosen from the labels."""
MORE = ("baselines", "memory", "hold_out", "minutes")
"""Those that ``train`` alone has."""


def train(command: Train) -> int:
    """Run the command. Everything is checked before anything is written."""
    began = time.monotonic()
    options, fields = settings(command, {name: getattr(command, name) for name in MORE}, AUTO)
    deadline: float | None = None
    chosen: Sequence[Choice] = ()
    if options.get("minutes") is not None or options["method"] == AUTO:
        from nestling.commands.choose import choose, deadline_of

        deadline = deadline_of(options.get("minutes"), began)
        if options["method"] == AUTO:
            options, fields, chosen = choose(command, options, fields)
    out = Path(command.out or default_folder(options, fields))
    if command.dry_run:
        if speaks():
            from nestling.commands.dry_run import dry_run

            dry_run(command, options, fields, out, deadline, chosen)
        return 0
    with RunFolder(out, writer=speaks()) as folder:
        from nestling.commands.pipeline import Pipeline
        from nestling.engine.runtime import processes

        with processes(command.device):
            pipeline = Pipeline(
                folder, options, fields, command.data_dir, command.device, command.workers, command.compile
            )
            pipeline.run(deadline, chosen)
    answer(str(out))
    return 0


def speaks() -> bool:
    """Whether this process prints and writes: of those that torchrun starts, the first; one by itself always."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def default_folder(options: dict[str, Any], fields: dict[str, Any]) -> str:
    """Named by the source, the method and a hash of the settings."""
    digest = hashlib.sha256(json.dumps([options, fields], sort_keys=True).encode()).hexdigest()[:8]
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(options["source"]).stem) or "source"
    return f"runs/{name}-{options['method']}-{digest}"


def settings(
    command: TrainingOptions, more: Mapping[str, Any] | None = None, method: str = "nested"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Options and fields after defaults < --config < --set and options. Raises UsageError.

    ``more``: what this command has beside the options of every training; ``method``: where none is given.
    """
    config = {} if command.config is None else read_config(command.config)
    if not isinstance(config, dict):
        raise UsageError(f"'given' in {command.config} must be a table of settings, got {config!r:.80}")
    # A demo's recipe says how many seeds it took; a training takes one.
    config.pop("seeds", None)
    options: dict[str, Any] = {"method": method, "seed": 0, "known": {}, "backbone": "auto"}
    for name, kind in OPTIONS.items():
        given = (more or {}).get(name) if name in MORE else getattr(command, name)
        if given is not None and given != FLAGS.get(name):
            options[name] = given
        elif name in config:
            options[name] = config[name] if name == "known" else convert(name, config[name], kind)
        config.pop(name, None)
    if command.level_names is not None:
        options["levels"] = command.level_names
    for name in ("levels", "hold_out"):
        if name in options:
            options[name] = list(options[name])
    if isinstance(options["known"], str):
        options["known"] = parse_known(options["known"])
    if not isinstance(options["known"], dict):
        raise UsageError(f"known must be a table of level = fraction, got {options['known']!r:.80}")
    if not options.get("source"):
        raise UsageError(
            "train needs a SOURCE: a catalogue name such as digits, a folder tree, a CSV or Parquet file, "
            "or hf:owner/name"
        )
    for name in ("source", "taxonomy"):
        if not encodes(options.get(name, "")):
            raise UsageError(f"the {name} {options[name]!r} is no valid Unicode: rename it, or give a link to it")
    if options["seed"] < 0:
        raise UsageError(f"seed must be an integer of at least 0, got {options['seed']}")
    fields = merge(config, parse_assignments(command.set))
    if command.target_mix is not None:
        fields["prior"] = read_mix(command.target_mix, options["method"])
    return options, fields


def read_mix(path: str, method: str) -> list[str]:
    """The CSV class,share as the recipe's field ``prior``, which stands in the run's settings. Raises UsageError."""
    from nestling.data.concepts import read_pairs

    if method not in ("robust", AUTO):
        raise UsageError(f"--target-mix is the prior of the concepts' weights, which {method} has not: --method robust")
    return [f"{name}={share}" for name, share in read_pairs(path, "class", "share").items()]


def encodes(text: str) -> bool:
    """Whether UTF-8, in which a run's files are written, holds it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def parse_known(text: str) -> dict[str, float]:
    """``coarse=1.0,fine=0.1`` to numbers. Raises UsageError."""
    known: dict[str, float] = {}
    for part in text.split(","):
        level, equals, value = (piece.strip() for piece in part.partition("="))
        if level in known:
            raise UsageError(f"--known {text!r} gives the fraction of level {level!r} twice: leave one of them")
        try:
            known[level] = float(value)
        except ValueError:
            equals = ""
        if not equals or not level:
            raise UsageError(
                f"cannot read --known {text!r}: expected level=fraction, such as coarse=1.0,middle=0.4,fine=0.1"
            )
    return known


def answer(text: str) -> None:
    """What a command ends with, on stdout; it has finished, also where nobody reads that any more."""
    if speaks():
        with suppress(BrokenPipeError):
            print(text)


def say(text: str) -> None:
    """A line on stderr; stdout carries results alone."""
    if speaks():
        print(text, file=sys.stderr, flush=True)
