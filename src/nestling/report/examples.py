"""The grid of test rows: picture, path with confidences, and the answer, marked right or wrong."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup
from PIL import Image

from nestling.evaluate.decide import CONFIDENT
from nestling.report.content import Content, Example
from nestling.report.summary import level_names

LARGEST, PIXELATED, SHOWN = 160, 64, 48
"""Pixels that a picture is reduced to; up to which it is scaled up without smoothing; examples shown."""


@dataclass(frozen=True)
class Step:
    """One level of a path; ``right`` is None where the truth is not known."""

    level: str
    name: str
    percent: float
    right: bool | None
    answered: bool


@dataclass(frozen=True)
class Card:
    """One example as the template wants it."""

    picture: str
    pixelated: bool
    item: str
    truth: str
    steps: list[Step]
    answer: str
    answer_level: str
    right: bool | None
    unsure: bool
    """Whether the answer is less sure than an answer should be: the coarsest level, for want of a better one."""


@dataclass(frozen=True)
class Group:
    """Cards under a heading."""

    title: str
    cards: list[Card]


def png_uri(image: np.ndarray) -> tuple[str, bool]:
    """(data URI, whether to scale up without smoothing) of a uint8 picture (c, h, w), reduced where it is large."""
    image = np.asarray(image, dtype=np.uint8)
    if image.ndim == 2:
        image = image[None]
    grey = image.shape[0] < 3
    picture = Image.fromarray(np.ascontiguousarray(image[0] if grey else image[:3].transpose(1, 2, 0)))
    picture.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    uri = Markup("data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii"))
    return uri, max(image.shape[1:]) <= PIXELATED


def card(example: Example, levels: Sequence[str]) -> Card:
    """What the template shows of one row."""
    truth = [name or "" for name in example.truth]
    answer = example.answer or {}
    steps = []
    for k, (name, confidence) in enumerate(zip(example.path, example.confidence, strict=False)):
        level = levels[k] if k < len(levels) else f"level {k + 1}"
        known = k < len(truth) and truth[k] != ""
        percent = 100 * min(max(float(confidence), 0.0), 1.0) if np.isfinite(confidence) else 0.0
        steps.append(Step(level, name, percent, truth[k] == name if known else None, answer.get("level") == level))
    pictured = example.image is not None and np.ndim(example.image) in (2, 3)
    uri, pixelated = png_uri(np.asarray(example.image)) if pictured else ("", False)
    right = next((step.right for step in steps if step.answered), None)
    names = " › ".join(name for name in truth if name) or "not labelled"
    answered, level = str(answer.get("class", "")), str(answer.get("level", ""))
    unsure = bool(answer) and float(answer["confidence"]) < CONFIDENT
    return Card(uri, pixelated, example.item, names, steps, answered, level, right, unsure)


def groups(content: Content) -> list[Group]:
    """Examples by how deep the answer goes: at the end of the path, above it, unsure even there, or none."""
    levels = content.taxonomy.levels if content.taxonomy else level_names(content)
    cards = [card(example, levels) for example in content.examples[:SHOWN]]
    sure = [c for c in cards if c.steps and c.steps[-1].answered and not c.unsure]
    coarser = [c for c in cards if c.answer and not c.unsure and c not in sure]
    unsure = [c for c in cards if c.unsure]
    silent = [c for c in cards if not c.answer]
    named = [
        ("Unsure of the finest class: it answers with a coarser one", coarser),
        ("Unsure of every class: it answers with the coarsest one all the same", unsure),
        ("Too unsure to answer", silent),
        ("Sure down to the finest class", sure),
    ]
    return [Group(title, members) for title, members in named if members]
