"""Modules by the names of levels, which users choose as they like."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from urllib.parse import unquote

from torch import nn

TAKEN = frozenset(dir(nn.ModuleDict()))


class ByLevel(nn.ModuleDict):
    """``nn.ModuleDict`` for keys of any characters: it refuses those with a dot, and those named as its own attributes
    (``half``, ``type``, ``train``). Weights keep the plain name wherever that is allowed."""

    def __getitem__(self, level: str) -> nn.Module:
        return super().__getitem__(_stored(level))

    def __setitem__(self, level: str, module: nn.Module) -> None:
        super().__setitem__(_stored(level), module)

    def __delitem__(self, level: str) -> None:
        super().__delitem__(_stored(level))

    def __contains__(self, level: str) -> bool:
        return super().__contains__(_stored(level))

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def keys(self) -> Any:
        """The names of the levels."""
        return [unquote(name) for name in self._modules]

    def items(self) -> Any:
        """Names of levels with their modules."""
        return list(zip(self.keys(), self._modules.values(), strict=True))


def _stored(level: str) -> str:
    """A name that a module may have; ``unquote`` gives the level back."""
    name = level.replace("%", "%25").replace(".", "%2E")
    # What is taken begins with an ASCII letter or an underscore.
    return f"%{ord(name[0]):02X}{name[1:]}" if name in TAKEN else name
