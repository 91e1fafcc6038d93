"""Sixteen processes that want one run folder at the same moment: one gets it, the others are told who that is."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from killing import LIMIT, TRAIN, wait_until
from nestling.lock import RunLock
from running import same, succeed

NUMBER = 16

CONTENDER = """
    import os, sys
    from nestling.engine.runfolder import RunFolder
    from nestling.errors import BusyError

    print("ready", flush=True)
    sys.stdin.read()
    try:
        with RunFolder(sys.argv[1]):
            assert "torch" not in sys.modules
            print("holds", flush=True)
            os.read(int(sys.argv[2]), 1)
    except BusyError as error:
        print(error, flush=True)
        sys.exit(error.exit_code)
"""
"""Takes a run folder as ``nestling train`` does, when its input ends; keeps it until the pipe of that number does."""

COMMAND = """
    import sys
    print("ready", flush=True)
    sys.stdin.read()
    from nestling.__main__ import main
    main(sys.argv[1:])
"""


@contextmanager
def contenders(code: str, arguments: Sequence[object], keep: Sequence[int] = ()) -> Iterator[list[subprocess.Popen]]:
    """Sixteen processes that begin in one moment: all of them read one pipe, which ends for all at once."""
    begin, end = os.pipe()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
            stdin=begin,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            pass_fds=keep,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for _ in range(NUMBER)
    ]
    os.close(begin)
    try:
        for process in processes:
            assert process.stdout is not None and process.stdout.readline() == "ready\n"
        os.close(end)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def round_of(run: Path) -> None:
    """One of sixteen gets ``run`` and is killed; all others have been told who it is."""
    reading, writing = os.pipe()
    try:
        with contenders(CONTENDER, [run, reading], [reading]) as processes:
            said = {process.pid: process.stdout.readline() for process in processes if process.stdout}
            holders = [process for process in processes if said[process.pid] == "holds\n"]
            assert len(holders) == 1, said
            for process in processes:
                if process is not holders[0]:
                    assert process.wait(LIMIT) == 6
                    assert re.search(rf"is held by process {holders[0].pid} on \S+ ", said[process.pid]), said
            holders[0].kill()
            assert holders[0].wait(LIMIT) == -9
    finally:
        os.close(reading)
        os.close(writing)


@pytest.mark.parametrize("rounds", [2, pytest.param(20, marks=pytest.mark.long)])
def test_sixteen_want_one_folder(rounds: int, tmp_path: Path) -> None:
    """Each round's holder is killed, and in the next round one of the next sixteen enters."""
    for _ in range(rounds):
        round_of(tmp_path / "run")
    with RunLock(tmp_path / "run"):
        pass


@pytest.mark.long
def test_sixteen_trainings(tmp_path: Path) -> None:
    """The real command: the holder is killed in training, the next sixteen find it resumable, and one finishes it."""
    succeed(*TRAIN, "--out", tmp_path / "undisturbed")
    run = tmp_path / "run"
    for kill in (True, False):
        with contenders(COMMAND, [*TRAIN, "--out", run]) as processes:
            wait_until(lambda: sum(process.poll() is not None for process in processes) >= NUMBER - 1)
            assert {process.poll() for process in processes} == {None, 6}
            (holder,) = (process for process in processes if process.poll() is None)
            for process in processes:
                if process is not holder:
                    assert process.stderr is not None
                    assert re.fullmatch(
                        rf"nestling: the run folder .* is held by process {holder.pid} on .*\n", process.stderr.read()
                    )
            if kill:
                wait_until(lambda holder=holder: list(run.glob("stages/00-*")) or holder.poll() is not None)
                holder.kill()
            out, err = holder.communicate(timeout=LIMIT)
            assert (holder.returncode, out) == ((-9, "") if kill else (0, f"{run}\n")), err
    same(run, tmp_path / "undisturbed")


WITHOUT_TORCH = """
    import sys

    class Block:
        def find_spec(name, *_):
            if name == "torch":
                raise ImportError("torch is not to be had")

    sys.meta_path.insert(0, Block)
    from nestling.__main__ import main
    main(sys.argv[1:])
"""


def test_the_lock_is_taken_before_torch_is_imported(tmp_path: Path) -> None:
    """Where torch cannot be imported a busy folder is still said to be busy; a free one needs it."""
    command = [sys.executable, "-c", textwrap.dedent(WITHOUT_TORCH), *TRAIN, "--out", str(tmp_path / "run")]
    with RunLock(tmp_path / "run"):
        busy = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert busy.returncode == 6 and f"is held by process {os.getpid()} on" in busy.stderr, busy.stderr
    assert "Traceback" not in busy.stderr and busy.stderr.count("\n") == 1
    free = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert free.returncode == 1 and "torch is not to be had" in free.stderr
