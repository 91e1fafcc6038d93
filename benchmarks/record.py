"""A run's figures as results/NAME.json: ``python benchmarks/record.py RUN NAME "the command that made it"``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from nestling.files import write_json


def rows(method: str, entry: dict[str, Any], num_seeds: int) -> list[dict[str, Any]]:
    """Accuracy, confidence and expected calibration error of every level under every condition."""
    found = []
    for condition, levels in {
        "clean": entry["levels"],
        **{c: e["levels"] for c, e in entry["distortions"].items()},
    }.items():
        for level in levels:
            for metric in ("accuracy", "confidence", "overconfidence", "ece"):
                std = level.get("std", {}).get(metric)
                column = f"{condition} | {level['name']} | {metric}"
                found.append(
                    {"row": method, "column": column, "paper": None, "mean": level[metric], "std": std, "n": num_seeds}
                )
    return found


def claims(metrics: dict[str, Any], num_seeds: int) -> list[dict[str, Any]]:
    """Each comparison with a baseline as a claim that the method is better."""
    found = []
    for c in metrics.get("comparisons", []):
        better = c["difference"] if c["metric"] == "accuracy" else -c["difference"]
        lo, hi = c["interval"] if c["metric"] == "accuracy" else [-x for x in reversed(c["interval"])]
        outcome = "underpowered" if num_seeds < 3 or lo <= 0 <= hi else "holds" if lo > 0 else "does not hold"
        text = f"{metrics['method']} is better than {c['baseline']} in {c['metric']}, {c['level']}, {c['condition']}"
        name = f"{c['baseline']}-{c['metric']}-{c['level']}-{c['condition']}".replace(" ", "-")
        found.append(
            {"id": name, "text": text, "paper": None, "ours": better, "interval": [lo, hi], "verdict": outcome}
        )
    return found


def main(run: str, name: str, command: str) -> None:
    """Read RUN/metrics.json and write results/NAME.json."""
    metrics = json.loads((Path(run) / "metrics.json").read_text())
    seeds = [s["seed"] for s in metrics.get("seeds", [{"seed": metrics["seed"]}])]
    methods = {metrics["method"]: metrics, **metrics.get("methods", {})}
    kept = {key: metrics[key] for key in ("commit", "hardware", "versions", "seconds")}
    table = [row for method, entry in methods.items() for row in rows(method, entry, len(seeds))]
    write_result(name, seeds, table, claims(metrics, len(seeds)), command, kept)


def write_result(
    name: str, seeds: list[int], table: list[dict], claims: list[dict], command: str, made: dict[str, Any]
) -> None:
    """results/NAME.json, as ``publish`` reads it; ``made``: commit, hardware, versions and seconds."""
    found = {"name": name, "scale": "small", "seeds": seeds, "table": table, "claims": claims, "command": command}
    write_json(f"results/{name}.json", found | made)


if __name__ == "__main__":
    main(*sys.argv[1:])
