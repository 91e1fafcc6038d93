"""``python -m nestling``, and the ``nestling`` script."""

from __future__ import annotations

import io
import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; signals are taken over before anything heavy is imported."""
    from nestling import interrupt

    interrupt.install()
    from nestling.cli import run

    # A file name may hold what its encoding does not: it is printed as it came, or escaped.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape" if stream.encoding.lower() == "utf-8" else "backslashreplace")
    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main()
