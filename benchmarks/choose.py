"""Choose settings on held-out *training* rows: ``python benchmarks/choose.py demo|defaults``. Test rows are never read.

demo       recipes of ``nestling demo``: five folds of the 1,347 training digits.
defaults   the default of nested learning: mnist and fashion_mnist at 14 x 14 pixels, 6,000 training rows with 2 % and
           10 % fine labels, scored on the next 4,000 training rows; needs NESTLING_DATA.

Every training is kept in runs/choose and read back, so that a second call goes on. Writes results/<what>-choice.json.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
import torch
from record import write_result

from nestling.commands.finish import default_distortions, score
from nestling.commands.jobs import Job, run_jobs
from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.engine.fit import fit
from nestling.engine.run import Run
from nestling.engine.runtime import Runtime
from nestling.evaluate.compare import excess, gap
from nestling.evaluate.measure import CLEAN, outputs_of
from nestling.methods import EndToEnd, FlatMarginal, Nested, Optimizer, Recipe
from nestling.objectives.calibration import negative_log_likelihood
from nestling.provenance import commit, hardware, versions

RUNS = Path("runs/choose")
RATES = (1e-3, 3e-3, 1e-2)


def digits_candidates() -> dict[str, Recipe]:
    """Every method at every rate, 600 steps of 64 rows; nested learning as in the paper and with what was added."""
    flat = {"epochs": 60, "steps_per_epoch": 10, "batch_size": 64, "selection": "likelihood"}
    found: dict[str, Recipe] = {}
    # End-to-end is best at the lowest of the three rates: one lower for the rivals.
    for rate in (3e-4, *RATES):
        optimizer = Optimizer(lr=rate)
        found[f"end-to-end lr={rate}"] = EndToEnd(**flat, optimizer=optimizer)
        found[f"flat-marginal lr={rate}"] = FlatMarginal(**flat, optimizer=optimizer)
        if rate not in RATES:
            continue
        for epochs, marginal in product(((10, 10, 40), (5, 5, 50)), (True, False)):
            balance = "levels" if marginal else "rows"
            found[f"nested lr={rate} epochs={epochs} marginal={marginal}"] = Nested(
                **flat | {"epochs": epochs}, optimizer=optimizer, marginal=marginal, balance=balance
            )
    found["nested with rejection, lr=0.003 epochs=(5, 5, 50) marginal=True"] = Nested(
        **flat | {"epochs": (5, 5, 50)}, optimizer=Optimizer(lr=3e-3), calibration="both"
    )
    return found


def digits_fold(fold: int) -> tuple[LabelledData, LabelledData]:
    """Four fifths of the training digits, labelled as in the demo, and the fifth that scores."""
    data = load_data("digits", "train")
    held = np.arange(len(data)) % 5 == fold
    return data.subset(~held).keep({"middle": 0.4, "fine": 0.1}, seed=fold), data.subset(held)


def default_candidates() -> dict[str, Recipe]:
    """The paper's cascade, what balance and the marginal loss add, and the rivals; equal steps (800 of 64 rows)."""
    steps = {"steps_per_epoch": 20, "batch_size": 64, "selection": "likelihood", "optimizer": Optimizer(lr=3e-3)}
    cascade = {**steps, "epochs": (7, 8, 25), "calibration": "both"}
    return {
        "nested, the paper's": Nested(**cascade, marginal=False, balance="rows"),
        "nested, marginal, balanced": Nested(**cascade, marginal=True, balance="levels"),
        "end-to-end": EndToEnd(**steps, epochs=40),
        "flat-marginal": FlatMarginal(**steps, epochs=40),
    }


@lru_cache(maxsize=1)
def training_rows(source: str) -> LabelledData:
    """All training rows of a source, at 14 x 14 pixels."""
    return load_data(source, "train", image_size=14)


def image_rows(source: str, fine: float, seed: int) -> tuple[LabelledData, LabelledData]:
    """6,000 training rows, labelled in part, and 4,000 others that score."""
    data, start = training_rows(source), 10_000 * seed
    train = data.subset(np.arange(start, start + 6000)).keep({"middle": max(0.2, fine), "fine": fine}, seed)
    return train, data.subset(np.arange(start + 6000, start + 10_000))


def train_one(what: str, setting: str, name: str, recipe: Recipe, seed: int) -> None:
    """Train one candidate on one fold or seed, in its own folder."""
    train, _ = rows(what, setting, seed)
    fit(recipe, train, out=folder(what, setting, name, seed), seed=seed, precision=precision(what), verbose=False)


def precision(what: str) -> str:
    """The demo's networks are too small to gain from bf16; the others take what is fast here."""
    return "fp32" if what == "demo" else "auto"


def rows(what: str, setting: str, seed: int) -> tuple[LabelledData, LabelledData]:
    """Training and scoring rows."""
    if what == "demo":
        return digits_fold(seed)
    source, fine = setting.split(" ")
    return image_rows(source, float(fine), seed)


def folder(what: str, setting: str, name: str, seed: int) -> Path:
    """Where a training is kept."""
    return RUNS / what / setting.replace(" ", "-") / name.replace(" ", "_") / str(seed)


def log_loss(run: Run, held: LabelledData, distortions: list[str], reject: bool) -> float:
    """-log p(true finest class) in nats, over clean and distorted rows: accuracy and confidence in one."""
    outputs = outputs_of(run.model, run.preprocessing, held, Runtime.choose("cpu", "fp32"), distortions)
    finest, target = held.taxonomy.levels[-1], torch.from_numpy(held.labels[:, -1:])
    found = [run.model.answers(output, reject).combined[finest] for output in outputs.values()]
    return float(np.mean([negative_log_likelihood({finest: p}, target, (finest,)) for p in found]))


def scores(what: str, setting: str, name: str, recipe: Recipe, seeds: list[int]) -> Iterator[dict]:
    """A row of the table for every way in which the candidate can answer (with and without rejection; CRM)."""
    collected: dict[str, list] = {}
    for seed in seeds:
        train, held = rows(what, setting, seed)
        run = fit(
            recipe, train, out=folder(what, setting, name, seed), seed=seed, precision=precision(what), verbose=False
        )
        distortions = default_distortions(run.preprocessing.height)
        for way, m in score(recipe.method, run, held, Runtime.choose("cpu", "fp32"), distortions).items():
            finest = held.taxonomy.levels[-1]
            per_level = {level: m.correct(held, level).mean() for level in held.taxonomy.levels}
            warped = [m.correct(held, finest, c).mean() for c in m.decisions if c != CLEAN]
            gaps = {c: gap(excess([m], held, finest, [c])) for c in m.decisions}
            collected.setdefault(way, []).append(
                {
                    **per_level,
                    "distorted": np.mean(warped),
                    "gap": gaps.pop(CLEAN),
                    "gap distorted": np.mean(list(gaps.values())),
                    "log loss": log_loss(run, held, distortions, not way.endswith("only)")),
                }
            )
    for way, found in collected.items():
        for column in found[0]:
            values = [f[column] for f in found]
            std = float(np.std(values, ddof=1)) if len(values) > 1 else None
            yield {
                "row": f"{setting} | {name} | {way}",
                "column": column,
                "paper": None,
                "mean": float(np.mean(values)),
                "std": std,
                "n": len(values),
            }


def write_table(name: str, command: str, seeds: list[int], table: list[dict], began: float) -> None:
    """results/NAME.json, as ``publish`` reads it; ``began`` by ``time.monotonic()``."""
    seconds = round(time.monotonic() - began, 1)
    made = {"commit": commit(), "hardware": hardware(), "versions": versions(), "seconds": seconds}
    write_result(name, seeds, table, [], command, made)


def main(what: str) -> None:
    """Train every candidate that is not trained yet, score, and write the table."""
    began = time.monotonic()
    candidates = digits_candidates() if what == "demo" else default_candidates()
    settings = ["digits"] if what == "demo" else [f"{s} {f}" for s in ("mnist", "fashion_mnist") for f in (0.02, 0.1)]
    seeds = list(range(5 if what == "demo" else 3))
    jobs = [
        Job(f"{setting} {name} {seed}", train_one, (what, setting, name, recipe, seed))
        for setting in settings
        for seed in seeds
        for name, recipe in candidates.items()
    ]
    # A training that is finished is read back in a moment.
    run_jobs(jobs)
    table = [
        row
        for setting in settings
        for name, recipe in candidates.items()
        for row in scores(what, setting, name, recipe, seeds)
    ]
    for name in dict.fromkeys(row["row"] for row in table):
        print(
            name, "|", ", ".join(f"{r['column']} {100 * r['mean']:.1f}" for r in table if r["row"] == name), flush=True
        )
    write_table(f"{what}-choice", f"python benchmarks/choose.py {what}", seeds, table, began)


if __name__ == "__main__":
    main(sys.argv[1])
