"""One writer a run folder: a lock of the kernel's, which goes with its holder, and the holder's name in its file."""

from __future__ import annotations

import fcntl
import os
import re
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

from nestling.errors import BusyError
from nestling.files import storage_error

WAIT = 5.0
"""Seconds after which a holder that has not written down its name is not waited for."""


class RunLock:
    """Held by the one process that writes a run folder: ``with RunLock(folder): …``. Raises BusyError with the holder.

    The lock is the kernel's (flock), so it goes with its holder, however that ends. Where nothing else was written, its
    file is removed again, and the folder if the lock created it: a command refused for bad settings leaves nothing.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.path = self.folder / "run.lock"
        self.descriptor: int | None = None
        self.created: list[Path] = []
        self.before: set[str] = set()

    def __enter__(self) -> RunLock:
        try:
            self._acquire()
        except OSError as error:
            # Where the lock is had but no name can be written to it, nobody must be kept out by it.
            self.__exit__()
            self._remove_created()
            raise storage_error("write", self.folder, error) from error
        _held.add(self)
        return self

    def _acquire(self) -> None:
        while True:
            missing = [p for p in (self.folder, *self.folder.parents) if not p.exists()]
            self.folder.mkdir(parents=True, exist_ok=True)
            self.created = missing or self.created
            self.before = {p.name for p in self.folder.iterdir()}
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = _holder(descriptor)
                os.close(descriptor)
                raise BusyError(
                    f"the run folder {self.folder} is held by {holder}: wait for it, or choose another --out"
                ) from None
            # The holder before us may have removed its folder between our open and our flock.
            with suppress(OSError):
                if os.fstat(descriptor).st_ino == self.path.stat().st_ino:
                    break
            os.close(descriptor)
        self.descriptor = descriptor
        os.truncate(descriptor, 0)
        os.pwrite(
            descriptor, f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv)[:200]})".encode(), 0
        )

    def __exit__(self, *_: object) -> None:
        if self.descriptor is None:
            return
        if self.path.name not in self.before and {p.name for p in self.folder.iterdir()} == {
            *self.before,
            self.path.name,
        }:
            self.path.unlink()
            self._remove_created()
        self.release()

    def _remove_created(self) -> None:
        with suppress(OSError):
            for folder in self.created:
                folder.rmdir()

    def release(self) -> None:
        """Close the lock's file; the kernel releases the lock."""
        _held.discard(self)
        if self.descriptor is not None:
            os.close(self.descriptor)
            self.descriptor = None


def _holder(descriptor: int) -> str:
    """Who holds a lock: its holder writes that down as soon as it has it, and we may be faster.

    Until then there stands nothing, or the name of a holder that was killed.
    """
    until = time.monotonic() + WAIT
    while True:
        text = os.pread(descriptor, 4096, 0).decode(errors="replace").strip()
        if (text and not _gone(text)) or time.monotonic() > until:
            return text or "another process"
        time.sleep(0.01)


def _gone(holder: str) -> bool:
    """Whether it is a process of this machine that is no more."""
    found = re.match(r"process (\d+) on (\S+)", holder)
    if found is None or found[2] != socket.gethostname():
        return False
    try:
        os.kill(int(found[1]), 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False


_held: set[RunLock] = set()


def _release_in_child() -> None:
    # A forked worker that outlives a killed run would keep it locked.
    for lock in list(_held):
        lock.release()


os.register_at_fork(after_in_child=_release_in_child)
