"""``nestling evaluate``: a trained model on labelled rows, clean, distorted and attacked."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nestling.bundle import Bundle, load_bundle
from nestling.commands.errors import concept_column, doubts
from nestling.commands.figures import figure_lines
from nestling.commands.index import is_flat, loose_pictures
from nestling.commands.outputs import PAGE, refuse_others
from nestling.commands.reading import own_source, read_as
from nestling.commands.show import require_model
from nestling.commands.train import say
from nestling.commands.unknown import HELD_OUT, measure_unknown
from nestling.commands.words import attack_lines, score_lines
from nestling.data.distortions import parse_distortion
from nestling.data.hold_out import hold_out
from nestling.data.sources import has_own_test_rows, load_data
from nestling.data.tables import split_name
from nestling.data.text import loaded_for
from nestling.data.transforms import Preprocessing
from nestling.engine.runtime import Runtime
from nestling.errors import DataError, StorageError, UsageError
from nestling.evaluate.attack_specs import parse_attack
from nestling.evaluate.attacked import attack_metrics, attackable_level, pixels_of, under_attack
from nestling.evaluate.measure import measure, outputs_of
from nestling.files import write_json, write_text
from nestling.provenance import provenance

if TYPE_CHECKING:
    from nestling.data.dataset import LabelledData
    from nestling.options import Evaluate


def evaluate(command: Evaluate) -> int:
    """Run the command."""
    began = time.monotonic()
    if (command.html or command.folds is not None) and not command.errors:
        raise UsageError("--html and --folds belong to the list of probable mistakes: add --errors")
    refuse_others(command.json, "{")
    refuse_others(command.html, PAGE)
    for spec in command.distort:
        parse_distortion(spec)
    for spec in command.attack:
        parse_attack(spec)
    if command.attack_level is not None and not command.attack:
        raise UsageError(f"--attack-level {command.attack_level} has no effect without --attack: give one, or leave it")
    require_model(Path(command.run))
    bundle = load_bundle(command.run)
    command = read_as(bundle, command)
    if command.attack:
        pixels_of(bundle.preprocessing)
        attackable_level(bundle.model, command.attack_level)
    runtime = Runtime.choose(command.device, "fp32")
    source = command.source or own_source(command.run, bundle)
    if not source:
        raise UsageError(f"{command.run} does not say what it was trained on: give --source")
    levels = command.level_names or bundle.config.get("levels")
    held_out = bundle.config.get("hold_out")
    try:
        data = load_data(
            source,
            command.split,
            command.data_dir,
            bundle.tree,
            levels,
            **loaded_for(bundle.preprocessing),
            qualify_names=command.qualify_names,
            on_bad_image=command.on_bad_image or "error",
            seed=bundle.config.get("seed", 0),
            concepts=concept_column(bundle, source, command.data_dir),
            sides=bundle.sides,
        )
    except UsageError as error:
        if command.source:
            raise
        raise UsageError(f"{error}; {command.run} was trained on {source!r}: give --source where it is now") from error
    except DataError as error:
        if "unknown class" not in str(error):
            raise
        other = f", or measure them by --unknown {source}" if command.source else ""
        raise DataError(f"{error} Leave the labels of rows empty that the model has no class for{other}") from None
    others: dict[str, LabelledData] = {}
    if held_out is not None:
        data, others[HELD_OUT] = hold_out(data, held_out["classes"])
    if len(data) == 0 or not (data.labels >= 0).any():
        raise DataError(f"no row of {source}, split {command.split}, is labelled: there is nothing to score")
    outputs = outputs_of(bundle.model, bundle.preprocessing, data, runtime, command.distort)
    if not all(torch.isfinite(logits).all() for found in outputs.values() for logits in found.logits.values()):
        raise StorageError(f"the outputs of {command.run} are not finite: its weights are damaged; train again")
    for note in remarks(data, source, command, bundle):
        say(note)
    measurement = measure(bundle.model, outputs, data, concepts=bundle.config.get("concepts"))
    found: dict[str, Any] = measurement.metrics
    if command.false_alarm is not None or command.unknown:
        others = {name: rows for name, rows in others.items() if len(rows)} | other_rows(command, bundle)
        found = found | {
            "unknown": measure_unknown(
                bundle.model, bundle.preprocessing, bundle.scores, data, others, runtime, command.false_alarm
            )
        }
    doubted = None
    if command.errors:
        doubted = doubts(command, bundle, data, runtime)
        found = found | {"errors": doubted.entries()}
        if command.html:
            write_text(command.html, doubted.page(f"Labels to look at: {source}"))
    method = bundle.model.config["method"]
    attacked = {
        spec: attack_metrics(bundle.model, moved, data)
        for spec in command.attack
        for moved in [under_attack(bundle.model, bundle.preprocessing, data, runtime, spec, command.attack_level)]
    }
    found = found | ({"attacks": attacked} if attacked else {})
    metrics = found | provenance(method, bundle.config.get("seed", 0), time.monotonic() - began)
    if command.json == "-":
        print(json.dumps(metrics, indent=1, allow_nan=False))
        return 0
    if command.json:
        write_json(command.json, metrics)
    print(f"{method} on {source}, {command.split}: {len(data)} rows", file=sys.stdout)
    conditions: dict[str, dict[str, Any]] = {**metrics["distortions"], **attacked}
    scores: dict[str, Any] = {name: found["levels"] for name, found in conditions.items()}
    print("\n".join(score_lines({"clean" if scores else "": metrics["levels"], **scores})))
    for line in (*attack_lines(attacked), *figure_lines(metrics)):
        print(line)
    if doubted is not None:
        print("\n".join(doubted.lines()))
    return 0


def other_rows(command: Evaluate, bundle: Bundle) -> dict[str, LabelledData]:
    """The rows of every ``--unknown`` source, labelled or not: those of its test split, or all where it has none."""
    form, bad, found = bundle.preprocessing, command.on_bad_image or "error", {}
    for source in command.unknown:
        if isinstance(form, Preprocessing) and is_flat(source):
            found[source] = loose_pictures(source, (form.height, form.width), form.channels, bad == "skip")
        else:
            split = "test" if has_own_test_rows(source, command.data_dir) else "all"
            found[source] = load_data(source, split, command.data_dir, **loaded_for(form), on_bad_image=bad)
    return found


def remarks(data: LabelledData, source: str, command: Evaluate, bundle: Bundle) -> list[str]:
    """What to know of the rows before their figures are believed."""
    found = [note for note in data.notes if not note.startswith("pictures of ")]
    own = own_source(command.run, bundle)
    same = own is not None and same_source(source, own)
    if bundle.sides is not None:
        trained = bundle.sides.trained(data.marks)
        if trained:
            found.append(
                f"warning: the model was trained on {trained:,} of these {len(data):,} rows, and looks better on them "
                "than it is"
            )
    elif same and (split_name(command.split) or command.split) in ("train", "validation", "all"):
        found.append(
            f"warning: the model was trained on rows of split {command.split}, and looks better on them than it is"
        )
    if not same and any("no test split" in note for note in data.notes):
        found.append("--split all evaluates every row")
    return found


def same_source(one: str, other: str) -> bool:
    """Whether two sources are of one name, or one place."""
    return one == other or (Path(one).exists() and Path(one).resolve() == Path(other).resolve())
