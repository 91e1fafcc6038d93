"""Files that commands write where they are told to: never over what is not nestling's."""

from __future__ import annotations

from pathlib import Path

from nestling.errors import UsageError

PAGE = "<!DOCTYPE html>"


def refuse_others(path: Path | str | None, begins: str) -> None:
    """Raise UsageError where ``path`` holds something that does not begin so, and would be lost; ``-`` is stdout."""
    if path is None or str(path) == "-":
        return
    try:
        with Path(path).open("rb") as file:
            start = file.read(len(begins.encode()) + 64).decode("utf-8", "replace")
    except OSError:
        return
    if start.strip() and not "".join(start.split()).startswith("".join(begins.split())):
        raise UsageError(f"{path} is there and holds no answers of nestling: give another name, or delete it")
