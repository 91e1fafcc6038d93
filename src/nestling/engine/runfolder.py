"""A run's folder: one writer, the settings it was begun with, and what was chosen automatically."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nestling.config import load_toml, to_toml
from nestling.errors import DataError, UsageError
from nestling.files import TEMPORARY, remove_leftovers, write_text
from nestling.lock import RunLock

FINISHED = "report.html"
"""Written last: a run folder that holds it is finished."""


class RunFolder:
    """``with RunFolder(path) as folder: folder.open(given); …; folder.begin()``; the lock is held inside the block.

    Imports no torch, so that the lock is taken before that is loaded. Of several processes that train one run, the
    ``writer`` alone takes the lock, reads and writes; the others are told what it read. With ``dry`` the lock is taken,
    and nothing of a run that is there is changed.
    """

    def __init__(self, path: Path | str, writer: bool = True, dry: bool = False) -> None:
        self.path = Path(path)
        self.writer, self.dry = writer, dry
        self.lock = RunLock(self.path)
        self.given: dict[str, Any] = {}
        self.derived: dict[str, dict[str, Any]] = {}
        self.begun = False
        self.finished = False

    def __enter__(self) -> RunFolder:
        if self.writer:
            self.lock.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.writer:
            self.lock.__exit__(*error)

    @property
    def recipe(self) -> Path:
        """The file of settings: ``[given]`` and ``[derived]``."""
        return self.path / "recipe.toml"

    def open(self, given: Mapping[str, Any], share: Callable[[Any], Any] = lambda read: read) -> bool:
        """True where a run with these settings was begun here before. Writes nothing, and clears what a kill left.

        ``share`` gives what the writer read to the processes that train with it: ``collective.broadcast_object``.
        Raises UsageError naming the fields in which the settings differ from those that the run was begun with.
        """
        if self.writer:
            self.begun = self._open(json.loads(json.dumps(given)))
            if not self.dry:
                remove_leftovers(self.path)
            self.finished = self.begun and (self.path / FINISHED).exists()
        self.given, self.derived, self.begun, self.finished = share(
            (self.given, self.derived, self.begun, self.finished)
        )
        return self.begun

    def _open(self, given: dict[str, Any]) -> bool:
        self.given = given
        if not self.recipe.exists():
            names = {p.name for p in self.path.iterdir() if not p.name.startswith(TEMPORARY)}
            others = sorted(names - {self.lock.path.name})
            if others:
                raise UsageError(
                    f"the folder {self.path} holds other files ({others[0]} …) and no run: choose another --out"
                )
            return False
        stored = load_toml(self.recipe)
        before, now = flat(stored.get("given", {})), flat(self.given)
        differing = [name for name in sorted(before.keys() | now.keys()) if before.get(name) != now.get(name)]
        if differing:
            changes = "; ".join(
                f"{name}: {before.get(name, 'not set')} there, {now.get(name, 'not set')} now" for name in differing[:6]
            )
            raise UsageError(
                f"the run folder {self.path} was begun with other settings ({changes}): choose another --out, "
                "or the same settings"
            )
        self.derived = stored.get("derived", {})
        return True

    def begin(self) -> None:
        """Write the settings: from here on the folder holds a run."""
        self.begun = True
        self._write()

    def derive(self, name: str, value: object, reason: str) -> None:
        """Keep what was chosen automatically, and why."""
        plain = value if isinstance(value, bool | int | float | str) else str(value)
        # A resume finds the same value for the reason that the run began with it, which says less.
        if name not in self.derived or self.derived[name]["value"] != plain:
            self.derived[name] = {"value": plain, "reason": reason}
            if self.begun:
                self._write()

    def recognise(self, what: str, found: str, reason: str) -> None:
        """Keep a hash of ``what`` the run is made from. Raises DataError where the run was begun with another one."""
        if self.kept(what) not in (None, found):
            raise DataError(
                f"the {what} are not those that the run {self.path} was begun with: put them back, "
                "or choose another --out"
            )
        self.derive(what, found, reason)

    def kept(self, name: str) -> Any:
        """What was chosen when the run began, if it was begun before."""
        return self.derived.get(name, {}).get("value")

    def _write(self) -> None:
        if not self.writer or self.dry:
            return
        header = (
            f"# {' '.join(sys.argv)[:500]!r}\n"
            "# [given] was set; [derived] was chosen automatically, and is ignored where this file is a --config.\n"
        )
        write_text(self.recipe, header + to_toml({"given": self.given, "derived": self.derived}))


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted names."""
    result: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{name}.")
        else:
            result[prefix + name] = value
    return result
