"""``nestling predict``: pictures to paths, confidences and answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nestling.bundle import from_pretrained
from nestling.commands.answers import Progress, Table, answer_all, answer_texts, header, lines, printable
from nestling.commands.outputs import refuse_others
from nestling.commands.show import require_model
from nestling.commands.train import say
from nestling.data.images import find_images
from nestling.data.text import TextEncoding, find_texts
from nestling.errors import DataError, UsageError
from nestling.evaluate.decide import CONFIDENT
from nestling.evaluate.index import fingerprint
from nestling.evaluate.predictor import Predictor
from nestling.files import write_json

if TYPE_CHECKING:
    from nestling.options import Predict

OF_RISK = ("guarantee", "delta", "per")
"""Options that say how a risk is kept."""
LISTED = 1000
"""Files that cannot be read and are named at the end; more are counted."""


def predict(command: Predict) -> int:
    """Run the command. A file that cannot be read is reported, the others are answered, and the exit code is 3."""
    if command.json == "-" and command.csv == "-":
        raise UsageError("--json - and --csv - both want stdout: give one of them a file")
    if not command.files:
        raise UsageError("predict needs at least one picture, text or folder")
    require_model(Path(command.run))
    refuse_others(command.json, '[{"input":')
    predictor = from_pretrained(command.run, command.device)
    options = choose(command, predictor)
    texts = isinstance(predictor.preprocessing, TextEncoding)
    paths, missing = find_all(command.files, find_texts if texts else find_images)
    more = [name for name, asked in (("unknown", command.false_alarm), ("sets", command.sets)) if asked]
    table, done = None, set()
    if command.csv and command.csv != "-":
        nothing = dict.fromkeys(("csv", "json", "workers", "device"))
        about = {**asdict(command), **nothing, "model": fingerprint(predictor)}
        # Answers that are wanted as JSON too are all made anew.
        table = Table(Path(command.csv), about, more, anew=command.json is not None)
        done = table.done
    if done:
        say(f"{command.csv} holds {len(done):,} answers of {len(paths):,}: it goes on from there")
        paths = [path for path in paths if printable(str(path)) not in done]
        missing = [one for one in missing if one["input"] not in done]
    results: list[dict[str, Any]] = []
    progress = Progress(len(paths) + len(missing) + len(done), len(done))
    describe = partial(predictor.describe, **options)
    every = answer_texts(paths, describe) if texts else answer_all(predictor, paths, describe, command.workers)
    for answers in chain([missing] if missing else [], every):
        if table is not None:
            table.add(answers)
        if table is None or command.json:
            results += answers
        progress.add(len(answers))
    if table is not None:
        table.finish()
        errors = table.errors
    else:
        errors = [result["error"] for result in results if "error" in result]
    report(errors)
    write(command, results, more)
    return 3 if errors else 0


def find_all(names: Sequence[str], find: Callable[[str], list[Path]]) -> tuple[list[Path], list[dict[str, Any]]]:
    """The files of all arguments, and the arguments in which there are none. Raises DataError of the only argument."""
    paths: list[Path] = []
    missing: list[dict[str, Any]] = []
    for name in names:
        try:
            paths += find(name)
        except DataError as error:
            if len(names) == 1:
                raise
            missing.append({"input": printable(name), "error": printable(str(error))})
    return paths, missing


def choose(command: Predict, predictor: Predictor) -> dict[str, Any]:
    """What ``Predictor.describe`` is told, worked out once; what is promised is said. Raises UsageError."""
    given = {name: value for name in OF_RISK if (value := getattr(command, name)) is not None}
    options: dict[str, Any] = {}
    if command.guarantee == "crc" and command.delta is not None:
        raise UsageError("--delta has no effect on --guarantee crc, which bounds an average: leave it out")
    if command.risk is not None:
        options["backoff"] = predictor.back_off(command.risk, **given)
        say(f"risk {100 * command.risk:g} %: {options['backoff'].text}")
    elif given or command.sets:
        raise UsageError(f"--{next(iter(given), 'sets')} says how a risk is kept: add --risk, such as --risk 0.05")
    if command.sets:
        options["sets"] = predictor.set_thresholds(command.risk)
    if command.false_alarm is not None:
        options["raised"] = predictor.alarm(command.false_alarm)
    return options


def report(errors: list[str]) -> None:
    """The files that could not be read, at the end, where they are seen."""
    for error in errors[:LISTED]:
        print(f"nestling: {' '.join(error.split())}", file=sys.stderr)
    if len(errors) > LISTED:
        print(f"nestling: {len(errors) - LISTED:,} more files cannot be read; the table names them", file=sys.stderr)


def write(command: Predict, results: list[dict[str, Any]], more: list[str]) -> None:
    """The results where they were asked for; lines on stdout where nothing was."""
    if command.json == "-":
        print(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    elif command.json:
        write_json(command.json, results)
    if command.csv == "-":
        print(header(more) + lines(results, more), end="")
    if not command.json and not command.csv:
        for result in (r for r in results if "path" in r):
            print(line(result, command.risk is not None))


def line(result: dict[str, Any], guaranteed: bool) -> str:
    """One answer in words."""
    steps = " > ".join(
        f"{name} {100 * confidence:.0f} %"
        for name, confidence in zip(result["path"], result["confidence"], strict=True)
    )
    answer = result["answer"]
    if answer is None:
        said = "no answer"
    else:
        sure = guaranteed or answer["confidence"] >= CONFIDENT
        said = f"{answer['class']} ({answer['level']}{'' if sure else f', unsure: below {100 * CONFIDENT:.0f} %'})"
    if result.get("unknown"):
        said += f", perhaps {result['unknown']['text']}"
    for level, names in result.get("sets", {}).items():
        steps += f"; {level}: {', '.join(names) or 'none'}"
    return f"{result['input']}: {said}   {steps}"
