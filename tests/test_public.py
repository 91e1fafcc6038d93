"""The public surface, frozen: whatever changes in it shows as a change of ``public_surface.txt``.

``python tests/test_public.py > tests/public_surface.txt`` writes the file anew.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
from pathlib import Path

import pytest

FROZEN = Path(__file__).with_name("public_surface.txt")

COMMANDS = ("demo", "train", "evaluate", "predict", "lint", "index", "search", "sweep", "reproduce", "show")
METHODS = ("nested", "robust", "coins", "end-to-end", "flat-marginal")
OPTION = re.compile(r"^[│|]?\s{0,4}((?:-{1,2}[a-z][\w.-]*|\s*,\s*|\{[^}]*\}|[A-Z\[\]{}|=….]+|\s)+)")
"""The column of names at the left of a line of help; what a description says about other options is not in it."""


def help_of(*arguments: str) -> str:
    """What ``nestling … --help`` prints, in a terminal wide enough that no option is broken."""
    from nestling.__main__ import main

    printed = io.StringIO()
    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR", "TERM")}
    os.environ.update(COLUMNS="100", NO_COLOR="1", TERM="dumb")
    try:
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*arguments, "--help"])
    finally:
        for name, value in before.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
    return printed.getvalue()


def options_in(text: str) -> list[str]:
    """The names of the options that a page of help lists, sorted."""
    found = set()
    for line in text.splitlines():
        match = OPTION.match(line)
        if match:
            found.update(re.findall(r"(?<![\w-])(--?[a-z][\w.-]*)", match.group(1)))
    return sorted(found - {"--help", "-h"})


def surface() -> str:
    """The public names of nestling and the options of every command, one on a line."""
    import nestling
    from nestling import functional, methods

    sections = {
        "nestling": sorted(nestling.__all__),
        "nestling.functional": sorted(functional.__all__),
        "nestling.methods": sorted(methods.__all__),
    }
    for command in COMMANDS:
        sections[f"nestling {command}"] = options_in(help_of(command))
    for method in METHODS:
        listed = re.findall(r"^  ([a-z_.]+)  \(", help_of("train", "--method", method), flags=re.MULTILINE)
        sections[f"nestling train --method {method}"] = sorted(listed)
    return "\n\n".join("\n".join([f"[{title}]", *names]) for title, names in sections.items()) + "\n"


def test_options_are_read_from_help() -> None:
    text = (
        "usage: nestling train [-h] SOURCE [OPTIONS]\n"
        "╭─ options ──────────────────────────────────╮\n"
        "│ --seed INT       unlike --out, a number    │\n"
        "│ --out, -o PATH   (default: runs/…)         │\n"
        "│ --baselines, --no-baselines                │\n"
        "│ --optimizer.lr FLOAT [FLOAT ...]           │\n"
        "╰────────────────────────────────────────────╯\n"
    )
    assert options_in(text) == ["--baselines", "--no-baselines", "--optimizer.lr", "--out", "--seed", "-o"]


def test_public_surface_is_frozen() -> None:
    if not FROZEN.is_file():
        pytest.fail(f"{FROZEN.name} is missing: python tests/test_public.py > tests/public_surface.txt")
    assert surface() == FROZEN.read_text(encoding="utf-8"), (
        "the public surface has changed; where that is meant: python tests/test_public.py > tests/public_surface.txt, "
        "and a line in CHANGELOG.md"
    )


if __name__ == "__main__":
    print(surface(), end="")
