"""Several trainings at once on one machine, one thread each; every result is read back from its run folder."""

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
from multiprocessing.sharedctypes import Synchronized
from typing import Any

from nestling import interrupt
from nestling.cores import num_cores
from nestling.errors import Interrupted, NestlingError


@dataclass(frozen=True)
class Job:
    """A call of a function that can be imported, whose result lies in files; False says that nothing was done."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...]


def run_jobs(jobs: Sequence[Job], workers: int | None = None) -> None:
    """Run all jobs in their order, each by whichever of ``workers`` processes (by default one per core) is free next.

    Raises NestlingError where one fails.

    A signal is passed on to the jobs, which save and stop; then Interrupted is raised.
    """
    context = multiprocessing.get_context("spawn")
    workers = max(min(workers or num_cores(), len(jobs)), 1)
    failed: NestlingError | None = None
    with interrupt.deferred():
        following = context.Value("i", 0)
        running: list[BaseProcess] = [context.Process(target=_work, args=(jobs, following)) for _ in range(workers)]
        for process in running:
            process.start()
        told = False
        while running:
            if (interrupt.received() or failed) and not told:
                told = True
                for process in running:
                    process.terminate()
            for process in list(running):
                process.join(0.05)
                if process.exitcode is not None:
                    running.remove(process)
                    if process.exitcode and not interrupt.received() and failed is None:
                        failed = NestlingError(
                            f"a training ended with exit code {process.exitcode}; what was trained is kept"
                        )
                        failed.exit_code = process.exitcode if process.exitcode in (2, 3, 4, 5, 6) else 1
        if stopped := interrupt.received():
            raise Interrupted(
                stopped, f"stopped by {signal.Signals(stopped).name}; saved: the same command goes on from here"
            )
    if failed is not None:
        raise failed


def _work(jobs: Sequence[Job], following: Synchronized[int]) -> None:
    """``following``: the number of the job that is to be begun next, shared by all processes."""
    interrupt.install()
    parent = multiprocessing.parent_process()
    if parent is not None:
        # A parent that was killed cannot stop us; a run folder survives an end at any moment.
        threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()
    import torch

    torch.set_num_threads(1)
    while True:
        with following.get_lock():
            number = following.value
            following.value += 1
        if number >= len(jobs):
            return
        job = jobs[number]
        began = time.monotonic()
        try:
            done = job.function(*job.arguments)
        except NestlingError as error:
            print(f"nestling: {job.name}: {' '.join(str(error).split())}", file=sys.stderr)
            sys.exit(error.exit_code)
        if done is not False:
            print(f"{job.name}: trained in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
