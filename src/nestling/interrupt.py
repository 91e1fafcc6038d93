"""SIGINT and SIGTERM: before training they end the process at once, during training they are noted and obeyed by the engine.

``install`` runs before torch is imported, so that no moment is left in which a signal prints a traceback.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_deferred = 0
_received: int | None = None


def install() -> None:
    """Take over SIGINT and SIGTERM for this process."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _handle)


def _handle(number: int, _frame: object) -> None:
    global _received
    if _deferred and _received is None:
        _received = number
        return
    os.write(2, f"nestling: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


@contextmanager
def deferred() -> Iterator[None]:
    """Inside the block a first signal is only noted, for ``received`` to report; a second one ends the process at once."""
    global _deferred
    _deferred += 1
    try:
        yield
    finally:
        _deferred -= 1


def received() -> int | None:
    """The number of the signal that came, if one did."""
    return _received
