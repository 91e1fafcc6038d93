"""Memory of layerwise training beside end-to-end and activation checkpointing: ``python benchmarks/memory.py WAY K``.

Each way trains in a process of its own and prints JSON: bytes of tensors (as ``engine.estimate`` counts them), and
resident memory above that of the same process when torch and the data were loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

WAYS = ("layerwise", "end-to-end", "checkpointing")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A network and its batch."""

    k: int = 1
    width: int = 64
    num_blocks: int = 8
    side: int = 32
    batch: int = 256
    steps: int = 3
    backbone: str = "auto"


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """The most that it has had in memory."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def measure(way: str, setting: Setting) -> dict[str, Any]:
    """Train a few steps of the last layer's stage, where the most lies below it; of all layers for the others."""
    import torch
    from loops import Size, made

    from nestling.engine.estimate import estimate
    from nestling.engine.fit import fit, seeded
    from nestling.engine.runtime import Runtime
    from nestling.methods import Layerwise, Optimizer
    from nestling.methods.layerwise import ALL
    from nestling.models.build import build_model

    torch.set_num_threads(1)
    data = made(Size(side=setting.side, num_rows=2 * setting.batch))
    recipe = Layerwise(
        k=setting.k,
        width=setting.width,
        num_blocks=setting.num_blocks,
        downsample_at=(),
        norm="none" if setting.k == 1 else "batch",
        batch_size=setting.batch,
        steps_per_epoch=setting.steps,
        epochs=1,
        augmentation="crop-mirror",
        optimizer=Optimizer(name="sgd", lr=1e-3),
    )
    if way != "layerwise":
        recipe = replace(recipe, together=ALL, recompute=way == "checkpointing")
    runtime = Runtime.choose("cpu", "fp32")
    with seeded(0):
        model = build_model(data.taxonomy, data.image_shape, setting.backbone, "layerwise", recipe.network())
    # What torch imports when it makes its first optimiser is torch's.
    torch.optim.SGD([torch.zeros(1)])
    idle = resident()
    fit(recipe, data, model, device="cpu", precision="fp32", validation=data.subset(range(8)), verbose=False)
    above = peak() - idle
    with seeded(0):
        model = build_model(data.taxonomy, data.image_shape, setting.backbone, "layerwise", recipe.network())
    found = estimate(recipe, model, data, data.subset(range(8)), runtime, steps=setting.steps)
    trained = [e for e in found if e.peak]
    most = max(trained, key=lambda e: e.peak)
    return {
        "way": way,
        "tensors": max(e.parameters + e.gradients + e.optimizer + e.activations for e in trained),
        "peak": max(e.memory for e in trained),
        "resident": above,
        "seconds per epoch": max(e.seconds for e in trained),
        "seconds in all": sum(e.seconds for e in trained),
        "stage": most.name,
    }


def beside(setting: Setting) -> dict[str, dict[str, Any]]:
    """Every way, one process after the other."""
    found = {}
    for way in WAYS:
        command = [sys.executable, str(Path(__file__)), way, json.dumps(vars(setting))]
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env={**os.environ, "KINETO_LOG_LEVEL": "99"}
        )
        found[way] = json.loads(done.stdout)
    return found


def main() -> None:
    print(json.dumps(measure(sys.argv[1], Setting(**json.loads(sys.argv[2])))))


if __name__ == "__main__":
    main()
