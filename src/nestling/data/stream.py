"""Pictures decoded ahead, by worker processes, in exactly the order asked for.

A worker is told the numbers of the rows in a batch and gives back their pixels. It draws nothing and knows nothing of
augmentation, so that neither the number of workers nor a resume changes a run. It holds an index of the pictures, not
their bytes; it ends with the process that started it; and whatever goes wrong in it leaves as one of our errors.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader

from nestling.data.decode import decode
from nestling.data.images import LazyImages
from nestling.data.inputs import Inputs
from nestling.errors import DataError, NestlingError, UsageError

MAX_WORKERS = 8
PREFETCH = 2
"""Batches that each worker is ahead."""


def choose_workers(asked: int | None = None) -> tuple[int, str]:
    """How many workers decode, and why; ``asked`` is None for the automatic choice. Raises UsageError below 0."""
    if asked is not None:
        if asked < 0:
            raise UsageError(
                f"the number of workers must be at least 0, got {asked}: leave it out for an automatic choice"
            )
        return asked, "as given"
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:
        cores = os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = cores // max(processes, 1)
    many = f"{cores} cores" + (f" for {processes} processes" if processes > 1 else "")
    return max(min(share - 1, MAX_WORKERS), 0), f"{many}: all but one, at most {MAX_WORKERS}"


class Ahead:
    """``with Ahead(images, batches, workers) as ahead: for pixels in ahead: …``

    Gives uint8 (b, c, h, w) for each of ``batches``, int64 row numbers (b,), which are asked for as workers come to
    them. Without workers each batch is decoded when it is wanted. Raises ``DataError`` naming a picture that cannot be
    read and, at whatever point of the block it is noticed, ``NestlingError`` where a worker died.
    """

    def __init__(self, images: LazyImages, batches: Iterable[np.ndarray], workers: int) -> None:
        self.images, self.batches, self.workers = images, iter(batches), workers
        self.loader: Iterator[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        if not self.workers:
            return self.images.take(next(self.batches))
        if self.loader is None:
            self.loader = self._start()
        found = next(self.loader)
        if isinstance(found, _Unreadable):
            name = self.images.items[found.row]
            raise DataError(f"{name}{found.reason}; --on-bad-image skip leaves such pictures out")
        if isinstance(found, NestlingError):
            raise found
        return torch.from_numpy(found) if isinstance(found, np.ndarray) else found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
        # torch notices a dead worker in a signal handler, and so anywhere in the block.
        if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker"):
            raise NestlingError(
                "a worker that decodes pictures died, most often for lack of memory: give fewer --workers (with 0 "
                f"the training decodes them itself), or a smaller batch_size ({' '.join(str(error).split())})"
            ) from error

    def _start(self) -> Iterator[Any]:
        first = next(self.batches)
        num_bytes = len(first) * int(np.prod(self.images.shape[1:])) * self.workers * PREFETCH
        decoder = _Decoder(self.images.inputs, self.images.size, self.images.channels, _fits_shared_memory(num_bytes))
        with warnings.catch_warnings():
            # torch warns of more workers than cores, and Python of a fork beside other threads: the workers touch
            # neither a lock that one of ours may hold nor the device.
            warnings.simplefilter("ignore")
            loader = DataLoader(
                decoder,  # type: ignore[arg-type]
                batch_size=None,
                sampler=chain([first], self.batches),  # type: ignore[arg-type]
                num_workers=self.workers,
                prefetch_factor=PREFETCH,
                collate_fn=_as_it_is,
                worker_init_fn=_begin,
                # A fork has the index of the pictures at once, and runs no line of the user's script again.
                multiprocessing_context="fork" if sys.platform == "linux" else None,
                # One of its own: it would draw from the generator that the run is seeded by.
                generator=torch.Generator(),
            )
            try:
                return iter(loader)
            except OSError as error:
                raise NestlingError(
                    f"cannot start {self.workers} workers ({error.strerror or error}): give fewer --workers"
                ) from error

    def close(self) -> None:
        """End the workers, whatever they are doing: they hold nothing that would have to be put away."""
        loader: Any = self.loader
        if loader is None or loader._shutdown:
            return
        # torch's own way out waits for each worker, and for ever where one died with a lock in its hand.
        _remove_worker_pids(id(loader))
        loader._worker_pids_set, loader._shutdown = False, True
        for worker in loader._workers:
            worker.kill()
        for worker in loader._workers:
            worker.join(5)
        for queue in loader._index_queues:
            queue.cancel_join_thread()
            queue.close()


def in_parts(images: LazyImages, rows: np.ndarray, workers: int, num_rows: int = 256) -> Iterator[Tensor]:
    """The given rows, int64 (k,), as uint8 (b, c, h, w) with at most ``num_rows`` each."""
    batches = (rows[start : start + num_rows] for start in range(0, len(rows), num_rows))
    with Ahead(images, batches, workers) as ahead:
        yield from ahead


class _Unreadable(NamedTuple):
    row: int
    reason: str


class _Decoder:
    """What a worker knows: where the pictures are, and how large they shall be. Their names stay behind."""

    def __init__(self, inputs: Inputs, size: tuple[int, int], channels: int, shared: bool) -> None:
        self.inputs, self.size, self.channels, self.shared = inputs, size, channels, shared

    def __getitem__(self, rows: np.ndarray) -> Tensor | np.ndarray | _Unreadable | NestlingError:
        # What is raised in a worker comes out with its traceback as the message.
        try:
            raws = self.inputs.read(rows)
        except NestlingError as error:
            return type(error)(str(error))
        pixels = np.empty((len(rows), self.channels, *self.size), dtype=np.uint8)
        for place, raw in enumerate(raws):
            try:
                pixels[place] = decode(raw, self.size, self.channels, "")
            except DataError as error:
                return _Unreadable(int(rows[place]), str(error))
        return torch.from_numpy(pixels) if self.shared else pixels


def _as_it_is(batch: Any) -> Any:
    return batch


def _fits_shared_memory(num_bytes: int) -> bool:
    """Whether batches may come in shared memory; a container's is often 64 MiB, and a worker dies where it is full."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return True
    return 2 * num_bytes < status.f_bavail * status.f_frsize


def _begin(_worker: int) -> None:
    # Signals that reach every process of a run are the training's to obey; it ends its workers.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()


def _end_with_parent(pid: int) -> None:
    parent = multiprocessing.parent_process()
    # A sibling may hold the end of the pipe that the parent is known by, so its number is looked at as well.
    while (parent is None or parent.is_alive()) and os.getppid() == pid:
        time.sleep(0.5)
    os._exit(1)
