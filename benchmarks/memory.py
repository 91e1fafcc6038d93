"""Memory of layerwise training beside end-to-end and activation checkpointing.

Each way trains in a process of its own, since the memory that a process has had does not come back whole:
``python benchmarks/memory.py layerwise '{"k": 1}'`` prints what one takes as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from loops import Size, made
from networks import WAYS, Network

from nestling.engine.estimate import estimate
from nestling.engine.fit import fit
from nestling.engine.runtime import Runtime, seeded
from nestling.models.build import build_model
from nestling.models.model import Model

EPOCH = 50_000
"""Rows, CIFAR-10's, that seconds are of."""


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def most_resident() -> int:
    """The most that it has had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(way: str, network: Network, threads: int) -> dict[str, Any]:
    """Bytes that training takes, and seconds; the first on one thread, the others on ``threads``.

    tensors: weights, gradients, the optimiser's state and what is saved for the backward pass, of the dearest problem;
    peak: all tensors at the highest moment of a step; resident: what the process has in memory at its highest, above
    what it had when torch and the data were loaded. Seconds are of epochs of ``EPOCH`` rows: the mean over the
    problems, and of one epoch of each.
    """
    data = made(Size(side=network.side, num_rows=2 * network.batch))
    nothing = data.subset(range(0))
    recipe = network.recipe(way)

    def model() -> Model:
        with seeded(0):
            return build_model(data.taxonomy, data.image_shape, network.backbone, recipe.method, recipe.network())

    # More threads have more working memory, by how the work falls to them.
    torch.set_num_threads(1)
    # What torch imports when it makes its first optimiser is torch's.
    torch.optim.SGD([torch.zeros(1)])
    idle = resident()
    fit(recipe, data, model(), device="cpu", precision="fp32", verbose=False, whole=True)
    above = most_resident() - idle
    torch.set_num_threads(threads)
    found = estimate(recipe, model(), data, nothing, Runtime.choose("cpu", "fp32"), steps=1)
    # The last stage only calibrates.
    problems = [e for e in found if e.gradients]
    assert recipe.steps_per_epoch is not None
    seconds = [e.seconds / recipe.steps_per_epoch * EPOCH / network.batch for e in problems]
    return {
        "tensors": max(e.parameters + e.gradients + e.optimizer + e.activations for e in problems),
        "peak": max(e.memory for e in problems),
        "resident": above,
        "seconds per epoch": sum(seconds) / len(seconds),
        "seconds in all": sum(seconds),
    }


@cache
def beside(network: Network) -> dict[str, dict[str, Any]]:
    """Every way, one process after the other; measured once."""
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, way, json.dumps(asdict(network)), str(torch.get_num_threads())]
        # torch tells of each profile that it makes, and of memory that was there before.
        quiet = {"KINETO_LOG_LEVEL": "99", "TORCH_CPP_LOG_LEVEL": "ERROR"}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **quiet})
        found[way] = json.loads(done.stdout)
    return found


def table(networks: Mapping[str, Network]) -> list[dict[str, Any]]:
    """Every way of every network, as it stands in results/bench.json."""
    return [
        {"network": name, "way": way, **figures}
        for name, network in networks.items()
        for way, figures in beside(network).items()
    ]


def lines(found: list[dict[str, Any]]) -> Iterator[str]:
    """The table on the terminal: MB, each with its share of end-to-end's, and seconds."""
    if not found:
        return
    kinds = ("tensors", "peak", "resident")
    yield "network  way            " + "".join(f"{kind + ', MB':>19}" for kind in kinds) + "  s per epoch  s in all"
    whole = {row["network"]: row for row in found if row["way"] == "end-to-end"}
    for row in found:
        bytes_ = "".join(f"{row[k] / 1e6:10.1f} ({row[k] / whole[row['network']][k]:6.3f})" for k in kinds)
        yield (
            f"{row['network']:8} {row['way']:15}{bytes_}{row['seconds per epoch']:13.1f}{row['seconds in all']:10.1f}"
        )


def main() -> None:
    way, network, *threads = sys.argv[1:]
    print(json.dumps(measure(way, Network(**json.loads(network)), int(*threads or ["1"]))))


if __name__ == "__main__":
    main()
