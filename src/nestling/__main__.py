"""``python -m nestling``, and the ``nestling`` script."""

from __future__ import annotations

import sys


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; signals are taken over before anything heavy is imported."""
    from nestling import interrupt

    interrupt.install()
    from nestling.cli import run

    sys.exit(run(sys.argv[1:] if arguments is None else arguments))


if __name__ == "__main__":
    main()
