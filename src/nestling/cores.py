"""How many processor cores this process may use."""

from __future__ import annotations

import os


def num_cores() -> int:
    """Those that the system lets this process run on, where it says; else all of the machine."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
