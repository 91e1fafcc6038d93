"""What ``test_shapes`` runs in one process, each toy recipe killed at random: ``toy_kills.py FOLDER KILLS SEED``.

torch is imported once; every training is a fork of this process, which starts no thread of its own.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import torch

from killing import Step, num_saved, read_steps
from nestling.data.dataset import LabelledData
from nestling.engine import stage
from nestling.engine.stage import StageRun
from small import quick, rows
from toy_recipes import RECIPES, toy_model

SLEEP = 0.004
"""Seconds that a step takes longer, so that there are moments to kill it in."""


def train(name: str, data: LabelledData, out: Path) -> int:
    """One training in a fork; its process number."""
    if child := os.fork():
        return child
    code = 1
    try:
        original, log = StageRun.step, os.open(out.with_suffix(".steps"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)

        def step(run: StageRun, *arguments: Any) -> None:
            where = f"{run.stage.name} {run.progress.epoch} {run.progress.step}\n"
            time.sleep(SLEEP)
            original(run, *arguments)
            os.write(log, where.encode())

        StageRun.step = step  # type: ignore[method-assign]
        quick(RECIPES[name], data, out, model=toy_model(name, data))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def ended(child: int) -> int:
    """The exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def weights(out: Path) -> bytes:
    """Of the model and the terms of the last stage, and the log."""
    last = sorted((out / "stages").iterdir())[-1]
    return (last / "tensors.safetensors").read_bytes() + (out / "metrics.jsonl").read_bytes()


def main() -> None:
    torch.set_num_threads(1)
    # After every epoch, however long writing takes.
    stage.CHECKPOINT_SHARE = 1e12
    folder, kills, seed = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    generator, data, found = random.Random(seed), rows(), {}
    # What torch imports when it makes its first optimiser takes longer than a toy's training.
    torch.optim.SGD([torch.zeros(1)])
    for name in RECIPES:
        unbroken = folder / f"{name}-unbroken"
        began = time.monotonic()
        assert ended(train(name, data, unbroken)) == 0, name
        took = time.monotonic() - began
        order, stages = steps_of(unbroken), [path.name[3:] for path in sorted((unbroken / "stages").glob("[0-9]*"))]
        found[name] = []
        for number in range(kills):
            killed, tries, out = 0, 0, folder
            # One that had ended already, on a machine with less to do than before, is begun again, and so is the first
            # while it has saved nothing that the second process could go on from.
            while killed != -signal.SIGKILL or (number == 0 and not num_saved(out, order, stages)):
                if killed == 0 and tries:
                    took *= 0.9
                tries += 1
                out = folder / f"{name}-{number}-{tries}"
                child = train(name, data, out)
                time.sleep(generator.uniform(0.02, took))
                os.kill(child, signal.SIGKILL)
                killed = ended(child)
            before, saved = len(steps_of(out)), num_saved(out, order, stages)
            code = ended(train(name, data, out))
            found[name].append(
                {
                    "killed": killed,
                    "steps before": before,
                    "steps saved": saved,
                    "code": code,
                    "equal": code == 0 and weights(out) == weights(unbroken),
                    "went on": steps_of(out)[before:] == order[saved:],
                }
            )
    print(json.dumps(found))


def steps_of(out: Path) -> list[Step]:
    """The steps taken so far, by every process."""
    return read_steps(out.with_suffix(".steps"))


if __name__ == "__main__":
    main()
