"""Labels that are probably wrong, with thumbnails: a part of the report, and the page of ``evaluate --errors``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

import numpy as np
from jinja2 import Environment, StrictUndefined

from nestling.report.content import plain
from nestling.report.examples import png_uri


@dataclass(frozen=True, eq=False)
class Suspect:
    """One label that is probably wrong."""

    image: np.ndarray | None
    """uint8 (c, h, w)."""
    item: str
    given: str
    """The path that it is labelled with."""
    suggested: str
    score: float
    text: str = ""
    """How it begins, where it is no picture but a text."""

    @property
    def picture(self) -> tuple[str, bool]:
        """The picture as a data URI, empty without one, and whether it is scaled up without smoothing."""
        return ("", False) if self.image is None else png_uri(self.image)


def render_mistakes(title: str, levels: Mapping[str, Sequence[Suspect]], counts: Mapping[str, int]) -> str:
    """The page as one HTML text, complete in itself. ``counts``: the labels that were judged at each level."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, finalize=_shown, trim_blocks=True, lstrip_blocks=True
    )
    template = environment.from_string(files("nestling.report").joinpath("mistakes.html").read_text("utf-8"))
    return template.render(title=title, levels=levels, counts=counts).encode("utf-8", "replace").decode("utf-8")


def _shown(value: object) -> object:
    return plain(value) if type(value) is str else value
