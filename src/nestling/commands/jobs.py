"""Several trainings at once on one machine: a process each, one thread each, every result read back from its run folder."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

from nestling import interrupt
from nestling.errors import Interrupted, NestlingError


@dataclass(frozen=True)
class Job:
    """A call of a function that can be imported, whose result lies in files."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def run_jobs(jobs: Sequence[Job], say: Callable[[str], None], workers: int | None = None) -> None:
    """Run all jobs, ``workers`` at a time (by default one per core). Raises NestlingError where one fails.

    A signal is passed on to the jobs, which save and stop; then Interrupted is raised.
    """
    waiting, running = list(jobs), dict[str, tuple[BaseProcess, float]]()
    context = multiprocessing.get_context("spawn")
    workers = workers or len(os.sched_getaffinity(0))
    failed: NestlingError | None = None
    with interrupt.deferred():
        while waiting or running:
            stopped = interrupt.received()
            if (stopped or failed) and running:
                for process, _ in running.values():
                    process.terminate()
            if stopped or failed:
                waiting = []
            while waiting and len(running) < workers:
                job = waiting.pop(0)
                process = context.Process(target=_work, args=(job,), name=job.name)
                process.start()
                running[job.name] = process, time.monotonic()
            for name, (process, began) in list(running.items()):
                process.join(0.05)
                if process.exitcode is None:
                    continue
                del running[name]
                if process.exitcode == 0:
                    say(f"{name}: trained in {time.monotonic() - began:.1f} s")
                elif not stopped and failed is None:
                    failed = NestlingError(f"{name} ended with exit code {process.exitcode}; what it trained is kept")
                    failed.exit_code = process.exitcode if process.exitcode in (2, 3, 4, 5, 6) else 1
    if stopped := interrupt.received():
        raise Interrupted(
            stopped, f"stopped by {signal.Signals(stopped).name}; saved: the same command goes on from here"
        )
    if failed is not None:
        raise failed


def _work(job: Job) -> None:
    interrupt.install()
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A parent that was killed cannot stop us; a run folder survives an end at any moment.
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    try:
        job.function(*job.arguments)
    except NestlingError as error:
        print(f"nestling: {job.name}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(error.exit_code)
