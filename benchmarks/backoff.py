"""Does the guarantee hold, and what does it cost? 200 random splits into calibration and test rows, on two sets.

``python benchmarks/backoff.py [--splits 200] [--sets digits,cifar100]`` writes results/backoff.json. One network for
each set; nine test rows for each calibration row, both drawn from rows that the network has never seen.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.data.split import cut
from nestling.engine.fit import fit
from nestling.engine.runtime import Runtime
from nestling.evaluate.answered import Backoff, fixed, outcome, take
from nestling.evaluate.backoff import back_off
from nestling.evaluate.decide import CONFIDENT
from nestling.evaluate.measure import CLEAN, outputs_of
from nestling.evaluate.scores import Scores, scores_from
from nestling.files import write_json
from nestling.methods import Nested, Optimizer
from nestling.models.model import Answers
from nestling.provenance import provenance

RISKS, DELTA, SHARE = (0.05, 0.1), 0.1, 0.1


@dataclass(frozen=True)
class Set:
    """A network, and rows that it has not seen, by combined and by separate confidences."""

    validation: dict[str, Scores]
    pool: dict[str, Scores]
    about: str


def digits(seed: int = 0) -> Set:
    """395 of the 1,797 digits train and validate, a fifth of the former with their digit; 1,402 are left."""
    data = load_data("digits", "all")
    train, validation, pool = cut(data, (0.17, 0.05, 0.78), seed)
    known = {"coarse": 1.0, "middle": 0.4, "fine": 0.2}
    recipe = Nested(epochs=(5, 5, 40), steps_per_epoch=10, batch_size=64, optimizer=Optimizer(lr=3e-3))
    return learn(train.keep(known, seed), validation, pool, recipe, "auto", seed)


def cifar100(seed: int = 0) -> Set:
    """45,000 training rows, 5,000 validation rows, and the 10,000 test rows as the pool."""
    train, validation = cut(load_data("cifar100", "train"), (0.9, 0.1), seed)
    recipe = Nested(epochs=(2, 16), batch_size=128, optimizer=Optimizer(lr=3e-3))
    return learn(train, validation, load_data("cifar100", "test"), recipe, "conv:32/64/128", seed)


def learn(
    train: LabelledData, validation: LabelledData, pool: LabelledData, recipe: Nested, backbone: str, seed: int
) -> Set:
    """Train; nothing of the pool is looked at."""
    run = fit(recipe, train, validation=validation, backbone=backbone, seed=seed, device="cpu", precision="fp32")
    runtime = Runtime.choose("cpu", "fp32")
    found: list[dict[str, Scores]] = []
    with torch.no_grad():
        for rows in (validation, pool):
            answers = run.model.answers(outputs_of(run.model, run.preprocessing, rows, runtime)[CLEAN])
            combined = scores_from(answers, rows.labels, rows.taxonomy, run.model.flat)
            found.append({"combined": combined, "separate": separate(combined, answers)})
    accuracy = {level: round(value or 0, 3) for level, value in run.metrics["accuracy"].items()}
    about = f"{len(train)} rows to learn from, {len(validation)} validation, {len(pool)} unseen; accuracy {accuracy}"
    return Set(*found, about)


def separate(scores: Scores, answers: Answers) -> Scores:
    """Softmax without combination: every head by itself, answered as long as each head so far is confident."""
    best = [p.max(1) for p in answers.separate.values()]
    confidence = np.stack([p.double().cpu().numpy() for p, _ in best], axis=1)
    columns = np.stack([column.cpu().numpy() for _, column in best], axis=1)
    return replace(scores, confidence=np.minimum.accumulate(confidence, axis=1), columns=columns)


def split(found: Set, seed: int) -> dict[tuple[str, float | None], dict[str, float]]:
    """One random split: for every way to answer and risk, what came of the test rows."""
    order = np.random.default_rng(seed).permutation(len(found.pool["combined"]))
    size = int(len(order) * SHARE)
    results = {}
    for kind, name in (("combined", "ltt"), ("combined", "crc"), ("separate", "ltt")):
        calibration, test = (take(found.pool[kind], rows) for rows in (order[:size], order[size:]))
        row = name if kind == "combined" else f"{name}, softmax without combination"
        for risk in RISKS:
            chosen = back_off(calibration, found.validation[kind], risk, guarantee=name, delta=DELTA)
            results[row, risk] = figures(chosen, test, risk, name)
        if name == "ltt":
            plain = fixed(test.taxonomy, test.levels, CONFIDENT)
            row = "fixed 0.9" if kind == "combined" else "fixed 0.9, softmax without combination"
            for risk in RISKS:
                results[row, risk] = figures(plain, test, risk, name)
    return results


def figures(chosen: Backoff, test: Scores, risk: float, guarantee: str) -> dict[str, float]:
    """Realised risk (of crc: wrong answers among all rows), whether it is kept, mean depth, share answered."""
    found = outcome(test, chosen.depth_of(test))
    realised = found.wrong / len(test) if guarantee == "crc" else found.risk or 0.0
    return {"risk": realised, "kept": realised <= risk, "depth": found.depth, "answered": found.answered}


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--splits", type=int, default=200)
    parser.add_argument("--sets", default="digits,cifar100")
    parser.add_argument("--out", default="results/backoff.json")
    options = parser.parse_args()
    torch.set_num_threads(1)
    began, table, claims, abouts = time.monotonic(), [], [], {}
    for name in options.sets.split(","):
        found = {"digits": digits, "cifar100": cifar100}[name]()
        abouts[name] = found.about
        print(f"{name}: {found.about}", file=sys.stderr)
        splits = [split(found, seed) for seed in range(options.splits)]
        for row, risk in splits[0]:
            values = {key: np.array([s[row, risk][key] for s in splits], float) for key in splits[0][row, risk]}
            for key, value in values.items():
                entry = {"row": row, "column": f"{name} | {risk:g} | {key}", "paper": None, "mean": float(value.mean())}
                table.append(entry | {"std": float(value.std(ddof=1)), "n": len(value)})
            line = ", ".join(f"{key} {value.mean():.3f}" for key, value in values.items())
            print(f"  {row:40} {100 * risk:3.0f} %: {line}", file=sys.stderr)
            if not row.startswith("fixed"):
                claims.append(claim(name, row, risk, values))
    about = provenance("nested", 0, time.monotonic() - began)
    kept = {key: about[key] for key in ("commit", "hardware", "versions", "seconds") if key in about}
    head = {"name": "backoff", "scale": "small", "seeds": list(range(options.splits)), "sets": abouts}
    command = f"python benchmarks/backoff.py --splits {options.splits} --sets {options.sets}"
    write_json(options.out, head | {"table": table, "claims": claims, "command": command} | kept)


def claim(name: str, row: str, risk: float, values: dict[str, np.ndarray]) -> dict:
    """ltt: the risk is kept in at least 90 % of the splits; crc: on average, within two standard errors.

    Nothing is decided where most splits answer no row: no answer is never wrong.
    """
    count, text = len(values["risk"]), f"{name}: {row} keeps a risk of {100 * risk:g} %"
    if row == "crc":
        mean, error = float(values["risk"].mean()), float(values["risk"].std(ddof=1) / count**0.5)
        holds, ours, interval = mean - 2 * error <= risk, mean, [mean - 2 * error, mean + 2 * error]
        text += " on average over the splits, within two standard errors"
    else:
        ours = float(values["kept"].mean())
        error = (ours * (1 - ours) / count) ** 0.5
        holds, interval = ours >= 1 - DELTA, [ours - 2 * error, ours + 2 * error]
        text += f" in at least {100 * (1 - DELTA):g} % of the splits"
    said = float((values["answered"] > 0).mean()) > 0.5
    verdict = "underpowered" if not said else "holds" if holds else "does not hold"
    return {"id": f"{name}-{row}-{risk:g}".replace(" ", "-").replace(",", ""), "text": text, "paper": None,
            "ours": ours, "interval": interval, "verdict": verdict}  # fmt: skip


if __name__ == "__main__":
    main()
