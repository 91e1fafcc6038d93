"""The page that ``nestling search --html`` writes: each query beside what was found, right and wrong marked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import PurePath

import numpy as np
from jinja2 import Environment, StrictUndefined

from nestling.report.examples import png_uri


@dataclass(frozen=True, eq=False)
class Picture:
    """One picture of the page, or a text."""

    image: np.ndarray | None
    """uint8 (c, h, w); None where it cannot be shown."""
    item: str
    labels: str
    score: float | None = None
    right: bool | None = None
    """Whether it is of the query's class; None where that is not known."""
    text: str = ""
    """How it begins, where it is no picture but a text."""

    @property
    def uri(self) -> str:
        """The picture in the page itself, empty without one."""
        return "" if self.image is None else png_uri(self.image)[0]

    @property
    def name(self) -> str:
        """The item without its folders, which the page shows where the pointer rests."""
        return PurePath(self.item).name or self.item


@dataclass(frozen=True, eq=False)
class Shelf:
    """A query and what was found."""

    query: Picture
    hits: Sequence[Picture]
    error: str = ""


def render_search(shelves: Sequence[Shelf]) -> str:
    """The page as one HTML text, complete in itself. Names and labels are untrusted, and escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(files("nestling.report").joinpath("search.html").read_text("utf-8"))
    return template.render(shelves=shelves).encode("utf-8", "replace").decode("utf-8")
