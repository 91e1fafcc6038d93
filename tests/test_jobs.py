"""Several trainings at once: ``commands.jobs``."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from nestling.commands.jobs import Job, run_jobs
from nestling.errors import DataError


def mark(folder: Path, number: int, after: int = 0, seconds: float = 0.0) -> None:
    """Leave the number and the process that was given it, once ``after`` others have left theirs."""
    until = time.monotonic() + 60
    while len(list(folder.iterdir())) < after and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(seconds)
    with (folder / str(number)).open("x") as file:
        file.write(str(os.getpid()))


def wait(folder: Path) -> bool:
    return False


def fail(folder: Path) -> None:
    raise DataError("there is nothing to read")


def test_each_job_is_done_once_by_whichever_process_is_free(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The first job ends when all the others have, which the other process does meanwhile."""
    jobs = [Job(str(number), mark, (tmp_path, number, 0 if number else 5)) for number in range(6)]
    run_jobs([*jobs, Job("late", wait, (tmp_path,))], workers=2)
    assert set(re.findall(r"(.*): trained in", capfd.readouterr().err)) == {job.name for job in jobs}
    workers = [(tmp_path / str(number)).read_text() for number in range(6)]
    assert len(set(workers)) == 2 and workers.count(workers[0]) == 1


def test_a_failed_job_ends_them_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(Exception, match="ended with exit code 3") as caught:
        run_jobs([Job("broken", fail, (tmp_path,)), *(Job(str(n), mark, (tmp_path, n, 0, 1.0)) for n in range(30))], 2)
    assert getattr(caught.value, "exit_code", None) == 3
    assert "nestling: broken: there is nothing to read" in capfd.readouterr().err
    assert len(list(tmp_path.iterdir())) < 30
