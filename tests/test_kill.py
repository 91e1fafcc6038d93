"""The real command, killed at any moment and started again: it ends where the run that was never killed ends.

Steps are counted in the killed processes themselves: ``STEPS`` writes down every one that is taken.
"""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nestling.files import TEMPORARY, read_lines
from running import refuse, spawn, succeed

STEPS = """
import os, sys
from nestling import interrupt
interrupt.install()
from nestling.engine import stage
from nestling.engine.stage import StageRun

# After every epoch, however long writing takes.
stage.CHECKPOINT_SHARE = 1e12
original, log = StageRun.step, os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_APPEND)

def step(run, *arguments):
    where = run.stage.name, run.progress.epoch, run.progress.step
    original(run, *arguments)
    os.write(log, " ".join(map(str, where)).encode() + b"\\n")

StageRun.step = step
from nestling.__main__ import main
main(sys.argv[2:])
"""
"""``nestling``, with a checkpoint after every epoch, and a line in a file for every step."""

DEMO = """
from dataclasses import replace
import nestling.commands.demo as demo

chosen = demo.recipes
demo.recipes = lambda: {name: replace(recipe, epochs=2, steps_per_epoch=60) for name, recipe in chosen().items()}
"""

STEPS_PER_EPOCH = 25
TRAIN = (
    *("train", "digits", "--backbone", "conv:4/8", "--precision", "fp32", "--device", "cpu"),
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


class Process:
    """``nestling`` on its way, in a process of its own."""

    def __init__(self, folder: Path, *arguments: object, before: str = "") -> None:
        self.run = folder / "run"
        self.steps = folder / f"steps-{len(list(folder.glob('steps-*')))}"
        self.began = time.monotonic()
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
        while not happened():
            if self.process.poll() is not None:
                return False
            assert time.monotonic() - self.began < LIMIT, "nothing happened"
            time.sleep(0.002)
        time.sleep(delay)
        return self.process.poll() is None

    def end(self, number: int | None = None) -> tuple[int, str, str]:
        """Send a signal, if any, and wait for the end: exit code (negative for a signal), stdout, stderr."""
        if number is not None:
            self.process.send_signal(number)
        out, err = self.process.communicate(timeout=LIMIT)
        return self.process.returncode, out, err

    def taken(self) -> list[tuple[str, int, int]]:
        """The steps taken so far; a step whose line was not written to its end is left out."""
        if not self.steps.exists():
            return []
        lines = self.steps.read_text(encoding="utf-8").split("\n")[:-1]
        return [(stage, int(epoch), int(step)) for stage, epoch, step in (line.split() for line in lines)]

    def exists(self, pattern: str) -> Callable[[], bool]:
        """Whether something of the run folder matches."""
        return lambda: any(True for _ in self.run.glob(pattern))


def last_checkpoint(run: Path) -> tuple[str, int, int]:
    """The stage, epoch and step from which a run folder goes on; step 0 of the stage after the last finished one."""
    finished = sorted(path.name for path in (run / "stages").glob("[0-9]*"))
    if len(finished) == len(STAGES):
        return "", 0, 0
    current = len(finished)
    partial = sorted(path.name for path in (run / "checkpoints").glob(f"{current:02d}-*"))
    epoch, step = map(int, partial[-1].split("-")[1:]) if partial else (0, 0)
    return STAGES[current], epoch, step


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def metrics(run: Path) -> dict[str, Any]:
    """Without what may differ: the time that it took, and the commit, which may change while tests run."""
    content = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name not in ("seconds", "commit")}


def same(run: Path, unbroken: Path) -> None:
    """Two runs ended alike: weights bit for bit, figures, and every logged step once."""
    assert weights(run) == weights(unbroken)
    assert metrics(run) == metrics(unbroken)
    assert (run / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    logged = Counter((record["stage"], record["step"]) for record in read_lines(run / "metrics.jsonl"))
    assert logged and set(logged.values()) == {1}
    assert (run / "report.html").stat().st_size > 10_000
    assert not list(run.rglob(TEMPORARY + "*"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbed, in this process."""
    run = tmp_path_factory.mktemp("unbroken") / "run"
    succeed(*TRAIN, "--out", run)
    return run


def go_on(folder: Path, kill: Callable[[Process], bool] | None) -> Process:
    """The command once more, killed where ``kill`` says; checks that it goes on where the last checkpoint is."""
    run = folder / "run"
    start = last_checkpoint(run)
    process = Process(folder, *TRAIN)
    killed = kill is not None and kill(process)
    code, out, err = process.end(signal.SIGKILL if killed else None)
    assert code == (-signal.SIGKILL if killed else 0), err
    assert "Traceback" not in err
    steps = process.taken()
    if steps:
        assert steps[0] == start, (start, steps[:3])
        assert max(Counter(steps).values()) == 1
    said = re.findall(r"^resumed stage (\S+) epoch (\d+) step (\d+)$", err, re.MULTILINE)
    if start[1:] != (0, 0) and (steps or not killed):
        assert said == [(start[0], str(start[1]), str(start[2]))]
    else:
        assert not said or (killed and not steps)
    if not killed:
        assert out == f"{run}\n"
    return process


def in_training(generator: random.Random) -> Callable[[Process], bool]:
    """Before the first checkpoint, most likely."""
    return lambda process: process.wait_for(process.taken, generator.uniform(0, 0.1))


def after_a_checkpoint(generator: random.Random) -> Callable[[Process], bool]:
    """In a stage that was interrupted, or soon after it."""
    return lambda process: process.wait_for(process.exists("checkpoints/02-*-*"), generator.uniform(0, 0.15))


def in_the_end(generator: random.Random) -> Callable[[Process], bool]:
    """While it evaluates, or writes bundle, figures or report."""
    return lambda process: process.wait_for(process.exists("stages/04-temperature"), generator.uniform(0, 0.4))


def test_killed_three_times(tmp_path: Path, unbroken: Path) -> None:
    generator = random.Random()
    for kill in (in_training, after_a_checkpoint, in_the_end):
        assert go_on(tmp_path, kill(generator)).process.returncode == -signal.SIGKILL
    last = go_on(tmp_path, None)
    same(tmp_path / "run", unbroken)
    assert not last.taken()

    done = succeed(*TRAIN, "--out", tmp_path / "run")
    assert "is finished" in done.err and done.out == f"{tmp_path / 'run'}\n"
    same(tmp_path / "run", unbroken)


@pytest.mark.long
@pytest.mark.parametrize("seed", range(6))
def test_killed_at_random_moments(seed: int, tmp_path: Path, unbroken: Path) -> None:
    """Some forty kills in all, from the first import to the last write."""
    generator = random.Random(seed)
    kinds = [in_training, after_a_checkpoint, in_the_end]
    for _ in range(7):
        if generator.random() < 0.5:
            kill = generator.choice(kinds)(generator)
        else:
            delay = generator.uniform(0, 8)

            def kill(process: Process, delay: float = delay) -> bool:
                return process.wait_for(lambda: time.monotonic() - process.began > delay)

        go_on(tmp_path, kill)
    go_on(tmp_path, None)
    same(tmp_path / "run", unbroken)


def test_stopped_by_signals(tmp_path: Path, unbroken: Path) -> None:
    """Ctrl-C, and SIGTERM on the way on; every step that was taken is saved."""
    run = tmp_path / "run"
    for number, steps in ((signal.SIGINT, 40), (signal.SIGTERM, 60)):
        start = last_checkpoint(run)
        process = Process(tmp_path, *TRAIN)
        assert process.wait_for(lambda process=process, steps=steps: len(process.taken()) > steps)
        refuse(6, [str(run), f"process {process.process.pid} on"], *TRAIN, "--out", run)
        code, out, err = process.end(number)
        assert (code, out) == (128 + number, "")
        assert re.search(r"^nestling: stopped by .*saved: the same command goes on", err.splitlines()[-1])
        assert "Traceback" not in err
        stage, epoch, step = start
        # A signal in an epoch's last step saves before the epoch is scored.
        assert process.taken()[0] == (start if step < STEPS_PER_EPOCH else (stage, epoch + 1, 0))
        stage, epoch, step = process.taken()[-1]
        after = [(stage, epoch, step + 1)] + [(stage, epoch + 1, 0)] * (step + 1 == STEPS_PER_EPOCH)
        # The signal may have come while the stage was being finished.
        assert last_checkpoint(run) in (*after, (STAGES[STAGES.index(stage) + 1], 0, 0))
        assert "not finished" in succeed("show", run).out
        refuse(2, ["is not finished", "run the same training command again"], "predict", run, "a.png")
    stage, epoch, step = last_checkpoint(run)
    done = succeed(*TRAIN, "--out", run)
    assert (epoch, step) == (0, 0) or f"resumed stage {stage} epoch {epoch} step {step}" in done.err
    same(run, unbroken)


def test_stopped_before_there_is_anything_to_save(tmp_path: Path) -> None:
    """The run folder is locked before torch is imported, which takes seconds."""
    process = spawn(*TRAIN, "--out", tmp_path / "run")
    while not (tmp_path / "run" / "run.lock").exists():
        assert process.poll() is None
        time.sleep(0.002)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=LIMIT) == ("", "nestling: stopped by SIGINT\n")
    assert process.returncode == 130


TWICE = """
import os, signal
from nestling import interrupt
interrupt.install()
with interrupt.deferred():
    for number in {numbers}:
        os.kill(os.getpid(), number)
    print(interrupt.received(), flush=True)
print("went on")
"""


@pytest.mark.parametrize(
    ("numbers", "code", "printed"),
    [([2], 130, "2\n"), ([15], 143, "15\n"), ([2, 15], 130, "2\n"), ([2, 2], 130, ""), ([2, 15, 15], 143, "")],
)
def test_a_second_signal_does_not_wait(numbers: list[int], code: int, printed: str) -> None:
    """Ctrl-C reaches a run's processes all at once, and the first tells the others: that is no second Ctrl-C.

    A first one that nobody obeyed ends the process where the block does.
    """
    command = [sys.executable, "-c", TWICE.format(numbers=numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (done.returncode, done.stdout) == (code, printed), done.stderr


OBEYED = """
import os, signal, sys
from nestling import interrupt
from nestling.errors import Interrupted
interrupt.install()
try:
    with interrupt.deferred():
        with interrupt.deferred():
            os.kill(os.getpid(), 15)
        raise Interrupted(interrupt.received(), "saved")
except Interrupted as error:
    print("obeyed")
    sys.exit(error.exit_code)
"""


def test_an_obeyed_signal_ends_nothing_twice() -> None:
    """Nor does an inner block end the process, before the outer one has obeyed."""
    done = subprocess.run([sys.executable, "-c", OBEYED], capture_output=True, text=True, check=False, timeout=LIMIT)
    assert (done.returncode, done.stdout, done.stderr) == (143, "obeyed\n", "")


BASELINES = (
    *("train", "digits", "--baselines", "--backbone", "conv:4/8", "--precision", "fp32", "--device", "cpu"),
    *("--known", "fine=0.3"),
    *("--set", "epochs=1", "steps_per_epoch=20", "batch_size=16", "optimizer.lr=0.01"),
)


@pytest.mark.long
def test_baselines_are_killed_too(tmp_path: Path) -> None:
    succeed(*BASELINES, "--out", tmp_path / "unbroken")
    process = Process(tmp_path, *BASELINES)
    assert process.wait_for(process.exists("methods/end-to-end/recipe.toml"), random.uniform(0, 0.3))
    process.end(signal.SIGKILL)
    done = succeed(*BASELINES, "--out", tmp_path / "run")
    same(tmp_path / "run", tmp_path / "unbroken")
    # What was finished is read back, not trained again.
    assert len(re.findall(r"^stage coarse:", done.err, re.MULTILINE)) == 0
    assert metrics(tmp_path / "run")["verdict"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_demo_is_broken_off(number: signal.Signals, tmp_path: Path) -> None:
    """Its trainings are processes of their own, and must not outlive it."""
    arguments = ("demo", "--seeds", 1)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    code, _, err = Process(tmp_path / "a", *arguments, before=DEMO).end()
    assert code == 0, err
    process = Process(tmp_path / "b", *arguments, before=DEMO)
    assert process.wait_for(process.exists("seeds/0/*/metrics.jsonl"), random.uniform(0, 0.5))
    code, _, err = process.end(number)
    assert code == (-number if number == signal.SIGKILL else 128 + number), err
    assert "Traceback" not in err
    code, out, err = Process(tmp_path / "b", *arguments, before=DEMO).end()
    assert code == 0 and "report:" in out, err
    same(tmp_path / "b" / "run", tmp_path / "a" / "run")
