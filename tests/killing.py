"""The real command as a process that is killed or stopped at any moment, and started again.

Steps are counted in the stopped processes themselves: ``STEPS`` writes down every one that is taken.
"""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

STEPS = """
import os, sys, time
from nestling import interrupt
interrupt.install()
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
from nestling.engine import stage
from nestling.engine.stage import StageRun

# After every epoch, however long writing takes.
stage.CHECKPOINT_SHARE = 1e12
original = StageRun.step

def step(run, *arguments):
    where = run.stage.name, run.progress.epoch, run.progress.step
    original(run, *arguments)
    os.write(log, " ".join(map(str, where)).encode() + b"\\n")

def finish(*arguments):
    os.write(log, b"finish 0 0\\n")
    return original_finish(*arguments)

def slowly(write):
    def late(*arguments, **options):
        time.sleep(0.15)
        write(*arguments, **options)
    return late

StageRun.step = step
from nestling.commands import finish as end, pipeline
original_finish, pipeline.finish = pipeline.finish, finish
# The end has moments to be stopped in, on the fastest machine too.
for name in ("save_bundle", "write_json", "write_text"):
    setattr(end, name, slowly(getattr(end, name)))
from nestling.__main__ import main
main(sys.argv[2:])
"""
"""``nestling``, with a checkpoint after every epoch, and a line in a file for every step, and for the end of training;
the file is there as soon as signals are taken over. What follows the training takes 0.45 seconds at least."""

STEPS_PER_EPOCH = 25
TRAIN = (
    *("train", "digits", "--method", "nested", "--backbone", "conv:4/8", "--precision", "fp32", "--device", "cpu"),
    *("--known", "middle=0.5,fine=0.3"),
    *(
        "--set",
        "epochs=[2,2,4]",
        f"steps_per_epoch={STEPS_PER_EPOCH}",
        "batch_size=32",
        "calibration=both",
        "rejection_epochs=1",
    ),
)
STAGES = ("coarse", "middle", "fine", "rejection", "temperature")
LIMIT = 120.0

Step = tuple[str, int, int]
"""Stage, epoch and step."""

FINISH: Step = ("finish", 0, 0)
"""Stands in a file of steps for the end of training."""


def wait_until(happened: Callable[[], object], every: float = 0.01) -> None:
    """Wait until it has happened."""
    until = time.monotonic() + LIMIT
    while not happened():
        assert time.monotonic() < until, "nothing happened"
        time.sleep(every)


class Process:
    """``nestling`` on its way, in a process of its own."""

    def __init__(self, folder: Path, *arguments: object, before: str = "") -> None:
        self.run = folder / "run"
        self.steps = folder / f"steps-{len(list(folder.glob('steps-*')))}"
        self.began = time.monotonic()
        self.seconds = 0.0
        """From the signal to the end."""
        self.reached = False
        """Whether it was the signal that ended it."""
        command = [sys.executable, "-c", before + STEPS, str(self.steps), *map(str, arguments), "--out", str(self.run)]
        self.process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
        )

    def wait_for(self, happened: Callable[[], object], delay: float = 0.0) -> bool:
        """Wait until it has happened, and ``delay`` seconds more; False where the process ended before."""
        until = None
        while until is None or time.monotonic() < until:
            if self.process.poll() is not None:
                return False
            if until is None and happened():
                until = time.monotonic() + delay
            assert time.monotonic() - self.began < LIMIT, "nothing happened"
            time.sleep(0.01)
        return True

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Send a signal, if any, and wait for the end: exit code (negative for a signal), stdout, stderr."""
        sent = time.monotonic()
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LIMIT)
        self.seconds = time.monotonic() - sent
        return self.process.returncode, out, err

    def taken(self) -> list[Step]:
        """The steps taken so far."""
        return [step for step in read_steps(self.steps) if step != FINISH]

    def trained(self) -> bool:
        """Whether it evaluates, or writes bundle, figures and report."""
        return FINISH in read_steps(self.steps)

    def exists(self, pattern: str) -> Callable[[], bool]:
        """Whether something of the run folder matches."""
        return lambda: any(True for _ in self.run.glob(pattern))


def read_steps(path: Path) -> list[Step]:
    """The steps in a file of "stage epoch step"; a line that was not written to its end is left out."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    lines = [line.split() for line in text.split("\n")[:-1]]
    return [(stage, int(epoch), int(step)) for stage, epoch, step in lines]


def last_checkpoint(run: Path, stages: Sequence[str] = STAGES) -> Step:
    """From where a run folder goes on; step 0 of the stage after the last finished one."""
    current = len(list((run / "stages").glob("[0-9]*")))
    if current == len(stages):
        return "", 0, 0
    partial = sorted(path.name for path in (run / "checkpoints").glob(f"{current:02d}-*"))
    epoch, step = map(int, partial[-1].split("-")[1:]) if partial else (0, 0)
    return stages[current], epoch, step


def num_saved(run: Path, order: list[Step], stages: Sequence[str] = STAGES) -> int:
    """How many of the steps that a run takes, ``order``, lie before its last checkpoint."""
    stage, *place = last_checkpoint(run, stages)
    here = (stages.index(stage) if stage else len(stages), *place)
    return sum((stages.index(name), *rest) < here for name, *rest in order)


def go_on(
    folder: Path, order: list[Step], when: Callable[[Process], bool] | None = None, number: int = signal.SIGKILL
) -> Process:
    """The command once more, sent a signal when ``when`` says, else to its end; ``order`` are a whole run's steps.

    Checks that it goes on where the last checkpoint is and, stopped by a signal that it can obey, that it saves every
    step that it took, exits by the signal's code within 5 seconds, and says so in one line.
    """
    run = folder / "run"
    start, before = last_checkpoint(run), num_saved(run, order)
    process = Process(folder, *TRAIN)
    try:
        sent = when is not None and when(process)
        code, out, err = process.end(number if sent else None)
    finally:
        process.process.kill()
    steps, finished = process.taken(), (run / "report.html").exists()
    assert "Traceback" not in err
    assert steps == order[before : before + len(steps)], (before, steps[:3])
    said = re.findall(r"^resumed stage (\S+) epoch (\d+) step (\d+)$", err, re.MULTILINE)
    if start[1:] != (0, 0) and (steps or not sent):
        assert said == [(start[0], str(start[1]), str(start[2]))]
    else:
        assert not said or (sent and not steps)
    if not sent or (code == 0 and finished):
        assert (code, out) == (0, f"{run}\n"), err
        return process
    process.reached = True
    if number == signal.SIGKILL:
        assert code == -number, err
        return process
    # Python gives signals back to the system at its very end.
    assert code == 128 + number or (finished and code == -number), (code, err)
    assert process.seconds < 5, process.seconds
    assert finished or (out == "" and re.search(r"^nestling: stopped by ", err.splitlines()[-1])), err
    assert num_saved(run, order) == before + len(steps), "not every step was saved"
    return process


def in_imports(process: Process, generator: random.Random) -> bool:
    """From the moment at which signals are taken over, until torch and the data are loaded."""
    return process.wait_for(process.steps.exists, generator.uniform(0, 1.5))


def in_training(process: Process, generator: random.Random) -> bool:
    """Before the first checkpoint, most likely."""
    return process.wait_for(process.taken, generator.uniform(0, 0.1))


def after_a_checkpoint(process: Process, generator: random.Random) -> bool:
    """In a stage that was interrupted, or soon after it."""
    there = process.exists("checkpoints/02-*-*")
    return process.wait_for(lambda: process.taken() and there(), generator.uniform(0, 0.15))


def in_the_end(process: Process, generator: random.Random) -> bool:
    """While it evaluates, or writes bundle, figures or report."""
    return process.wait_for(process.trained, generator.uniform(0, 0.4))


def anywhere(process: Process, generator: random.Random) -> bool:
    """Up to three seconds after signals were taken over; a whole run takes five or so."""
    return process.wait_for(process.steps.exists, generator.uniform(0, 3))


def phase(process: Process) -> str:
    """Where its signal met a process."""
    if process.trained():
        return "evaluation and report"
    return "training" if process.taken() else "imports and data"
