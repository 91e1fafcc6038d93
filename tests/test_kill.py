"""The real command, killed or stopped at any moment and started again: it ends where the undisturbed run ends."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from killing import (
    LIMIT,
    STEPS_PER_EPOCH,
    TRAIN,
    Process,
    Step,
    after_a_checkpoint,
    anywhere,
    go_on,
    in_imports,
    in_the_end,
    in_training,
    num_saved,
    phase,
    wait_until,
)
from running import metrics, refuse, same, spawn, succeed
from small import Watch

DEMO = """
from dataclasses import replace
import nestling.commands.demo as demo

chosen = demo.recipes
demo.recipes = lambda: {name: replace(recipe, epochs=2, steps_per_epoch=60) for name, recipe in chosen().items()}
"""


@pytest.fixture
def generator(record_property: Any) -> random.Random:
    """Of random moments, whose seed is recorded."""
    seed = random.randrange(10**6)
    record_property("seed", seed)
    return random.Random(seed)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    """The run that nobody disturbed, in this process, and its steps."""
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(patch)
        succeed(*TRAIN, "--out", run)
    return run, watch.taken


def test_killed_three_times_and_stopped_four_times(
    tmp_path: Path, undisturbed: tuple[Path, list[Step]], generator: random.Random, record_property: Any
) -> None:
    """One run: killed, Ctrl-C and SIGTERM, each in training and in what follows it."""
    run, (whole, order) = tmp_path / "run", undisturbed
    seconds: dict[str, list[float]] = {"SIGKILL": [], "SIGINT": [], "SIGTERM": []}

    def busy(process: Process, _: random.Random) -> bool:
        there = process.wait_for(lambda: len(process.taken()) > 30)
        refuse(6, [str(run), f"process {process.process.pid} on"], *TRAIN, "--out", run)
        return there

    for moment, number in (
        (in_training, signal.SIGKILL),
        (busy, signal.SIGINT),
        (after_a_checkpoint, signal.SIGKILL),
        (busy, signal.SIGTERM),
        (in_the_end, signal.SIGKILL),
        (in_the_end, signal.SIGTERM),
        (in_the_end, signal.SIGINT),
    ):
        process = go_on(tmp_path, order, lambda process, moment=moment: moment(process, generator), number)
        assert process.reached
        assert phase(process) == ("evaluation and report" if moment is in_the_end else "training")
        seconds[number.name].append(round(process.seconds, 2))
        if moment is busy:
            assert "not finished" in succeed("show", run).out
            refuse(2, ["is not finished", "run the same training command again"], "predict", run, "a.png")
    record_property("seconds to exit", seconds)
    assert "stage fine:" not in succeed(*TRAIN, "--out", run).err, "trained again"
    same(run, whole)
    done = succeed(*TRAIN, "--out", run)
    assert "is finished" in done.err and done.out == f"{run}\n"
    same(run, whole)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_twenty_at_random_moments(
    number: signal.Signals, tmp_path: Path, undisturbed: tuple[Path, list[Step]], record_property: Any
) -> None:
    """From the first import to the last write, several on every run, which then ends as the undisturbed one."""
    whole, order = undisturbed
    generator, seconds, phases = random.Random(int(number)), [], Counter()
    while len(seconds) < 20:
        folder = tmp_path / str(len(seconds))
        folder.mkdir()
        for moment in (in_imports, in_training, anywhere, after_a_checkpoint, in_the_end):
            process = go_on(folder, order, lambda process, moment=moment: moment(process, generator), number)
            if process.reached:
                seconds.append(round(process.seconds, 2))
                phases[phase(process)] += 1
        go_on(folder, order)
        same(folder / "run", whole)
    record_property("seconds to exit", seconds)
    record_property("moments", dict(phases))
    assert len(phases) == 3, phases


SCORED = """
import sys, time
from pathlib import Path
from nestling.engine import predict, select

predict.PIXELS_AT_ONCE = 1
passed = select.predict

def slowly(*arguments, obey, **options):
    def late():
        with Path(sys.argv[1] + "-scored").open("a") as file:
            file.write("a batch\\n")
        time.sleep(2)
        obey()
    return passed(*arguments, obey=late, **options)

select.predict = slowly
"""


def test_stopped_while_validation_rows_are_scored(tmp_path: Path, undisturbed: tuple[Path, list[Step]]) -> None:
    """Of five batches, which would take ten seconds, not all are waited for."""
    process = Process(tmp_path, *TRAIN, before=SCORED)
    scored = Path(f"{process.steps}-scored")
    assert process.wait_for(scored.exists)
    code, out, err = process.end(signal.SIGTERM)
    assert (code, out) == (143, ""), err
    assert re.search(r"stopped by signal 15 in stage coarse epoch 0 step \d+, while .*; saved", err.splitlines()[-1])
    assert len(scored.read_text().splitlines()) < 4
    assert num_saved(process.run, undisturbed[1]) == len(process.taken()) == STEPS_PER_EPOCH


def test_stopped_before_there_is_anything_to_save(tmp_path: Path) -> None:
    """The run folder is locked before torch is imported, which takes seconds."""
    process = spawn(*TRAIN, "--out", tmp_path / "run")
    wait_until(lambda: process.poll() is not None or (tmp_path / "run" / "run.lock").exists(), 0.002)
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
def test_baselines_are_killed_too(tmp_path: Path, generator: random.Random) -> None:
    succeed(*BASELINES, "--out", tmp_path / "unbroken")
    process = Process(tmp_path, *BASELINES)
    assert process.wait_for(process.exists("methods/end-to-end-*/recipe.toml"), generator.uniform(0, 0.3))
    process.end(signal.SIGKILL)
    done = succeed(*BASELINES, "--out", tmp_path / "run")
    same(tmp_path / "run", tmp_path / "unbroken")
    # What was finished is read back, not trained again.
    assert len(re.findall(r"^stage coarse:", done.err, re.MULTILINE)) == 0
    assert metrics(tmp_path / "run")["verdict"]


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_demo_is_broken_off(number: signal.Signals, tmp_path: Path, generator: random.Random) -> None:
    """Its trainings are processes of their own, and must not outlive it."""
    arguments = ("demo", "--seeds", 1)
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    code, _, err = Process(tmp_path / "a", *arguments, before=DEMO).end()
    assert code == 0, err
    process = Process(tmp_path / "b", *arguments, before=DEMO)
    assert process.wait_for(process.exists("seeds/0/*/metrics.jsonl"), generator.uniform(0, 0.5))
    code, _, err = process.end(number)
    assert code == (-number if number == signal.SIGKILL else 128 + number), err
    assert "Traceback" not in err
    code, out, err = Process(tmp_path / "b", *arguments, before=DEMO).end()
    assert code == 0 and "report:" in out, err
    same(tmp_path / "b" / "run", tmp_path / "a" / "run")
