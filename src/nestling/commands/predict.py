"""``nestling predict``: pictures to paths, confidences and answers."""

from __future__ import annotations

import csv
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nestling.bundle import from_pretrained
from nestling.commands.show import require_model
from nestling.commands.train import say
from nestling.data.images import find_images, read_images
from nestling.errors import UsageError
from nestling.evaluate.decide import CONFIDENT
from nestling.files import write_json, write_text

if TYPE_CHECKING:
    from nestling.options import Predict

OF_RISK = ("guarantee", "delta", "per")
"""Options that say how a risk is kept."""


def predict(command: Predict) -> int:
    """Run the command. A file that cannot be read is reported, the others are answered, and the exit code is 3."""
    if command.json == "-" and command.csv == "-":
        raise UsageError("--json - and --csv - both want stdout: give one of them a file")
    if not command.files:
        raise UsageError("predict needs at least one picture or folder")
    require_model(Path(command.run))
    given = {name: value for name in OF_RISK if (value := getattr(command, name)) is not None}
    if command.risk is None and (given or command.sets):
        raise UsageError(f"--{next(iter(given), 'sets')} says how a risk is kept: add --risk, such as --risk 0.05")
    predictor = from_pretrained(command.run, command.device)
    backoff = None if command.risk is None else predictor.back_off(command.risk, **given)
    sets = predictor.set_thresholds(command.risk) if command.sets else None
    if backoff is not None:
        say(f"risk {100 * command.risk:g} %: {backoff.text}")
    preprocessing = predictor.preprocessing
    paths = [path for name in command.files for path in find_images(name)]
    results: list[dict[str, Any]] = []
    good: list[np.ndarray] = []
    places: list[int] = []
    for number, (name, image) in enumerate(
        read_images(paths, (preprocessing.height, preprocessing.width), preprocessing.channels)
    ):
        if isinstance(image, np.ndarray):
            good.append(image)
            places.append(number)
            results.append({"input": printable(name)})
        else:
            results.append({"input": printable(name), "error": printable(str(image))})
    if good:
        for place, answer in zip(
            places, predictor.describe(torch.from_numpy(np.stack(good)), backoff, sets), strict=True
        ):
            results[place] |= {key: value for key, value in answer.items() if key != "input"}
    write(command, results)
    return 3 if len(good) < len(results) else 0


def printable(name: str) -> str:
    """A file's name, bytes that are no UTF-8 escaped: files of answers are UTF-8."""
    return name.encode("utf-8", "backslashreplace").decode()


def write(command: Predict, results: list[dict[str, Any]]) -> None:
    """The results where they were asked for; a table on stdout where nothing was."""
    for result in results:
        if "error" in result:
            print(f"nestling: {result['error']}", file=sys.stderr)
    if command.json == "-":
        print(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False))
    elif command.json:
        write_json(command.json, results)
    if command.csv == "-":
        print(table(results), end="")
    elif command.csv:
        write_text(command.csv, table(results))
    if not command.json and not command.csv:
        for result in (r for r in results if "path" in r):
            steps = " > ".join(
                f"{name} {100 * confidence:.0f} %"
                for name, confidence in zip(result["path"], result["confidence"], strict=True)
            )
            answer = result["answer"]
            if answer is None:
                print(f"{result['input']}: no answer   {steps}")
                continue
            sure = command.risk is not None or answer["confidence"] >= CONFIDENT
            unsure = "" if sure else f", unsure: below {100 * CONFIDENT:.0f} %"
            print(f"{result['input']}: {answer['class']} ({answer['level']}{unsure})   {steps}")


def table(results: list[dict[str, Any]]) -> str:
    """The results as CSV: input, answer, its level and confidence, path and confidences joined by '/', error."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["input", "answer", "level", "confidence", "path", "confidences", "error"])
    for result in results:
        answer = result.get("answer") or {}
        writer.writerow(
            [
                result["input"],
                answer.get("class", ""),
                answer.get("level", ""),
                answer.get("confidence", ""),
                "/".join(result.get("path", ())),
                "/".join(f"{c:.4f}" for c in result.get("confidence", ())),
                result.get("error", ""),
            ]
        )
    return text.getvalue()
