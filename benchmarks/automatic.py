"""What the automatic choice of a method costs: ``python benchmarks/automatic.py SET [SET ...]``.

The rule (methods/choose.py) was fixed in view of digits and plantvillage; grocery and newsgroups20 judge it. Labels
are hidden in three ways, each method is trained by ``nestling train SET --method M --minutes 1`` on three seeds, and
the one that is chosen without ``--method`` is compared with the best of them, by rows and seeds in pairs: in mean
accuracy over the levels that have labels, or where only coarse ones exist in fine R@1 by the features. A method that
does not apply has no figures: nestling says why, and so does the table.

A training on one core of two takes less than 90 s. Photographs are looked at with 16 x 16 pixels, decoded once for all
trainings: at 32 most of a minute went by before the first step, and a dozen steps were left.

Every training is kept in runs/automatic and read back. Writes results/automatic.json. Needs NESTLING_DATA.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from choose import write_table
from PIL import Image

import nestling
from nestling.commands.jobs import Job, run_jobs
from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.engine.runtime import Runtime
from nestling.evaluate.accuracy import paired_interval
from nestling.evaluate.measure import CLEAN, measure, outputs_of
from nestling.evaluate.predictor import Predictor
from nestling.files import write_json
from nestling.methods.choose import Seen, choose_method

RUNS = Path("runs/automatic")
SMALL, SIDE = ("grocery", "plantvillage"), 16
"""Sets whose pictures are made smaller, and how small."""
METHODS = ("nested", "flat-marginal", "end-to-end", "layerwise", "robust", "coins")
SEEDS = (0, 1, 2)
MINUTES = 1.0
HIDDEN: dict[str, dict[str, float]] = {
    "a tenth fine": {"middle": 0.4, "fine": 0.1},
    "half fine": {"middle": 0.7, "fine": 0.5},
    "coarse only": {"middle": 0.0, "fine": 0.0},
}
ACCEPTED = -0.03
"""The lower end of the interval may not be below it."""


def carry_out(source: str, hidden: str, method: str, seed: int) -> None:
    """Train one method through the command line, and keep how it fares on each test row, or why it does not apply."""
    place = folder(source, hidden, method, seed)
    if (place / "rows.json").exists():
        return
    test = load_data(source, "test", place_of(source))
    levels = test.taxonomy.levels
    known = {level: share for level, share in HIDDEN[hidden].items() if level in levels}
    options = ["--known", ",".join(f"{level}={share:g}" for level, share in known.items())]
    if hidden == "coarse only" and method != "coins":
        # The others learn the levels that have labels.
        options = ["--levels", levels[0]]
    words = [source, "--method", method, *options, "--minutes", str(MINUTES), "--seed", str(seed)]
    if source in SMALL:
        words += ["--data-dir", str(place_of(source))]
    run = place / "run"
    command = [sys.executable, "-m", "nestling", "train", *words, "--out", str(run)]
    done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode:
        found: dict[str, Any] = {"why not": done.stderr.decode().strip().splitlines()[-1]}
    else:
        predictor = nestling.from_pretrained(run)
        right = nearest(predictor, test) if hidden == "coarse only" else mean_right(predictor, test)
        found = {"right": [round(float(x), 4) for x in right]}
    write_json(place / "rows.json", found)


def place_of(source: str) -> Path | None:
    """Where a set with smaller pictures lies; None for others, which NESTLING_DATA has."""
    return RUNS / "data" if source in SMALL else None


def make_small(source: str) -> None:
    """Write the set with pictures of ``SIDE`` pixels, where that is not done."""
    for split in ("train", "test"):
        place = RUNS / "data" / source / f"{split}.parquet"
        if place.exists():
            continue
        data = load_data(source, split, image_size=SIDE)
        columns: dict[str, Any] = {"image": pa.array([encoded(x) for x in data.images(np.arange(len(data))).numpy()])}
        for level, codes in zip(data.taxonomy.levels, data.labels.T, strict=True):
            columns[level] = [data.taxonomy.classes[level][code] if code >= 0 else None for code in codes]
        place.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table(columns), place)


def encoded(pixels: np.ndarray) -> dict[str, Any]:
    """uint8 (3, h, w) as a cell of an ``image`` column."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{SIDE}.png"}


def mean_right(predictor: Predictor, test: LabelledData) -> np.ndarray:
    """(rows,): the share of the levels at which a row's answer is right; where there is none it is not."""
    scored = measure(predictor.model, outputs_of(predictor.model, predictor.preprocessing, test, quiet()), test)
    answered = scored.decisions[CLEAN].columns
    none = np.zeros(len(test), dtype=bool)
    return np.mean([scored.correct(test, x) if x in answered else none for x in test.taxonomy.levels], axis=0)


def nearest(predictor: Predictor, test: LabelledData) -> np.ndarray:
    """(rows,): 1 where the nearest other test row, by the cosine of features, has the row's finest class."""
    features = outputs_of(predictor.model, predictor.preprocessing, test, quiet())[CLEAN].embedding
    similar = F.normalize(features, dim=1) @ F.normalize(features, dim=1).T
    found = similar.fill_diagonal_(-torch.inf).argmax(1).numpy()
    return (test.labels[found, -1] == test.labels[:, -1]).astype(float)


def quiet() -> Runtime:
    """fp32 on the CPU."""
    return Runtime.choose("cpu", "fp32")


def folder(source: str, hidden: str, method: str, seed: int) -> Path:
    """Where a training is kept."""
    return RUNS / source / hidden.replace(" ", "-") / f"{method}-{seed}"


def chosen_for(source: str, hidden: str) -> str:
    """The method that the rule takes."""
    levels = load_data(source, "test").taxonomy.levels
    known = [int(1000 * HIDDEN[hidden].get(level, 1.0)) for level in levels]
    return choose_method(Seen(levels=levels, known=known))[0]


def judged(source: str, hidden: str) -> list[dict[str, Any]]:
    """A row for each method, and how the chosen one compares with the best."""
    found = {
        method: [json.loads((folder(source, hidden, method, seed) / "rows.json").read_text()) for seed in SEEDS]
        for method in METHODS
    }
    right = {
        method: np.stack([one["right"] for one in each])
        for method, each in found.items()
        if all("right" in one for one in each)
    }
    chosen, best = chosen_for(source, hidden), max(right, key=lambda method: right[method].mean())
    mean, low, high = paired_interval(right[chosen], right[best])
    table = []
    for method, each in found.items():
        figures: dict[str, Any] = {"row": f"{source}, {hidden} | {method}", "column": "score"}
        if method in right:
            values = right[method].mean(1)
            figures |= {"mean": float(values.mean()), "std": float(values.std(ddof=1)), "n": len(values)}
        else:
            figures |= {"mean": None, "std": None, "why not": next(one["why not"] for one in each if "why not" in one)}
        if method == chosen:
            figures |= {"chosen": True, "best": best, "over the best": mean, "interval": [low, high]}
        table.append(figures)
    verdict = "kept" if low >= ACCEPTED else "not kept"
    print(
        f"{source}, {hidden}: chosen {chosen}, best {best}, {100 * mean:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] "
        f"points: {verdict}"
    )
    for row in table:
        value = "n/a: " + row["why not"] if row["mean"] is None else f"{100 * row['mean']:.1f} ± {100 * row['std']:.1f}"
        print(f"  {row['row'].split(' | ')[1]:14} {value}")
    return table


def main(sources: list[str]) -> None:
    """Train what is not trained yet, judge, and write the table."""
    began = time.monotonic()
    for source in set(sources) & set(SMALL):
        make_small(source)
    jobs = [
        Job(f"{source} {hidden} {method} {seed}", carry_out, (source, hidden, method, seed))
        for seed in SEEDS
        for source in sources
        for hidden in HIDDEN
        for method in METHODS
    ]
    run_jobs(jobs)
    table = [row for source in sources for hidden in HIDDEN for row in judged(source, hidden)]
    write_table("automatic", f"python benchmarks/automatic.py {' '.join(sources)}", list(SEEDS), table, began)


if __name__ == "__main__":
    main(sys.argv[1:] or ["digits", "plantvillage", "grocery", "newsgroups20"])
