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
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader

from nestling.cores import num_cores
from nestling.data.decode import decode
from nestling.data.images import LazyImages
from nestling.data.inputs import Inputs
from nestling.errors import DataError, LostError, NestlingError, UsageError

MAX_WORKERS = 8
PREFETCH = 2
"""Batches that each worker is ahead."""


def choose_workers(asked: int | None = None) -> tuple[int, str]:
    """How many workers decode, and why; ``asked`` is None for the automatic choice. Raises UsageError below 0."""
    if asked is not None:
        if asked < 0:
            raise UsageError(f"the number of workers must be at least 0, got {asked}: leave it out, and it is chosen")
        return asked, "as given"
    cores = num_cores()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    share = cores // max(processes, 1)
    many = f"{cores} cores" + (f" for {processes} processes" if processes > 1 else "")
    return max(min(share - 1, MAX_WORKERS), 0), f"{many}: all but one, at most {MAX_WORKERS}"


class Ahead:
    """``with Ahead(images, batches, workers) as ahead: for pixels in ahead: …``

    Gives uint8 (b, c, h, w) for each of ``batches``, int64 row numbers (b,), which are asked for as workers come to
    them. Without workers each batch is decoded when it is wanted. Raises ``DataError`` naming a picture that cannot be
    read, and ``NestlingError`` where a worker died.
    """

    def __init__(self, images: LazyImages, batches: Iterable[np.ndarray], workers: int) -> None:
        self.images, self.batches, self.workers = images, iter(batches), workers
        self.loader: Iterator[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Tensor:
        try:
            return self._next()
        except NestlingError as error:
            # Of several processes each decodes rows of its own.
            error.of_all = False
            raise

    def _next(self) -> Tensor:
        if self.workers and self.loader is None:
            self._start()
        if self.loader is None:
            return self.images.take(next(self.batches))
        try:
            found = next(self.loader)
        # A worker that died is seen by torch, or by a connection that breaks off.
        except (EOFError, OSError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and not str(error).startswith(("DataLoader worker", "Too many open")):
                raise
            raise LostError(
                "a worker that decodes pictures died, most often for lack of memory: give fewer --workers (with 0 the "
                f"training decodes them itself), or a smaller batch_size ({_one_line(error)})"
            ) from error
        if isinstance(found, _Unreadable):
            name = self.images.items[found.row]
            raise DataError(f"{name}{found.reason}; --on-bad-image skip leaves such pictures out")
        if isinstance(found, NestlingError):
            raise found
        return found

    def _start(self) -> None:
        first = next(self.batches)
        self.batches = chain([first], self.batches)
        if not has_room(self.images, len(first), self.workers):
            self.workers = 0
            return
        with warnings.catch_warnings():
            # torch warns of more workers than cores, and Python of a fork beside other threads: the workers touch
            # neither a lock that one of ours may hold nor the device.
            warnings.simplefilter("ignore")
            loader = DataLoader(
                _Decoder(self.images.inputs, self.images.size, self.images.channels),  # type: ignore[arg-type]
                batch_size=None,
                sampler=self.batches,  # type: ignore[arg-type]
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
                self.loader = iter(loader)
            except (OSError, RuntimeError) as error:
                raise NestlingError(
                    f"cannot start {self.workers} workers ({_one_line(error)}): give fewer --workers"
                ) from error
        # Else torch's signal handler would raise wherever the training just is, in a finaliser for one.
        _remove_worker_pids(id(self.loader))
        self.loader._worker_pids_set = False  # type: ignore[attr-defined]

    def close(self) -> None:
        """End the workers, whatever they are doing: they hold nothing that would have to be put away."""
        loader: Any = self.loader
        if loader is None or loader._shutdown:
            return
        # torch's own way out waits for each worker, and for ever where one died with a lock in its hand.
        loader._shutdown = True
        for worker in loader._workers:
            worker.kill()
        for worker in loader._workers:
            worker.join(5)
        for queue in loader._index_queues:
            queue.cancel_join_thread()
            queue.close()


def has_room(images: LazyImages, num_rows: int, workers: int) -> bool:
    """Whether the batches of so many workers fit into shared memory. A container often has 64 MiB of it, and a worker
    that writes where there is none is killed."""
    try:
        status = os.statvfs("/dev/shm")
    except OSError:
        return True
    num_bytes = num_rows * int(np.prod(images.shape[1:])) * workers * (PREFETCH + 1)
    return 2 * num_bytes < status.f_bavail * status.f_frsize


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

    def __init__(self, inputs: Inputs, size: tuple[int, int], channels: int) -> None:
        self.inputs, self.size, self.channels = inputs, size, channels

    def __getitem__(self, rows: np.ndarray) -> Tensor | _Unreadable | NestlingError:
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
        return torch.from_numpy(pixels)


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_line(error: BaseException) -> str:
    text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return " ".join(text.split()) or type(error).__name__


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
