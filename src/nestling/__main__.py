"""``python -m nestling``, and the ``nestling`` script."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; signals are taken over before anything heavy is imported."""
    from nestling import interrupt

    interrupt.install()
    # Threads that spin while they wait take the cores from whoever else computes: with neighbours, training small
    # networks on two threads was a third as fast. OpenMP reads this when torch is loaded.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # torch's profiler, which measures the memory of a step, prints when it starts and stops.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    prepare_streams()
    from nestling.cli import run

    code = run(sys.argv[1:] if arguments is None else arguments)
    if code > 128:
        # Whoever sent the signal waits, and taking torch down takes a second, in which another one would be obeyed.
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)
    sys.exit(code)


def prepare_streams() -> None:
    """Let printing never fail: where a stream is closed, and where a file's name holds what no encoding does."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            # Else the next file that is opened would take the number, and whatever is printed to it.
            os.open(os.devnull, os.O_RDONLY)
    sys.stdout = sys.stdout or io.StringIO()
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")


if __name__ == "__main__":
    main()
