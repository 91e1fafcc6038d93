"""SIGINT and SIGTERM: before training they end the process at once, during training the engine obeys them.

``install`` runs before torch is imported, so that no moment is left in which a signal prints a traceback.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress

_deferred = 0
_received: list[int] = []


def install() -> None:
    """Take over SIGINT and SIGTERM for this process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)


def _handle(number: int, _frame: object) -> None:
    # Ctrl-C reaches every process of a run, and the parent tells its children by SIGTERM besides: only the same signal
    # once more says that the user will not wait.
    if _deferred and number not in _received:
        _received.append(number)
        return
    _end(number)


def _end(number: int) -> None:
    with suppress(OSError):
        os.write(2, f"nestling: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside the block a first signal is only noted, for ``received`` to report; the same again ends the process.

    Who obeys it leaves the outermost block by an error; where that ends as if nothing had come, so does the process.
    """
    global _deferred
    if not _deferred:
        _received.clear()
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1
    if _received and not _deferred:
        _end(_received[0])


def received() -> int | None:
    """The number of the signal that came, if one did."""
    return _received[0] if _received else None
