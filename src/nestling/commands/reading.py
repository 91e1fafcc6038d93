"""How a trained run reads sources: where its own lies, and what it was told of bad pictures and of names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from nestling.bundle import Bundle
from nestling.config import load_toml

if TYPE_CHECKING:
    from nestling.options import SourceOptions

AnySource = TypeVar("AnySource", bound="SourceOptions")
PLACE = "source"
"""Among what a run folder has derived: where the source lay, if it is a file or folder. A bundle does not tell it."""


def read_as(bundle: Bundle, command: AnySource) -> AnySource:
    """The command with what the run was told of pictures that cannot be read and of names, where it says nothing."""
    told = bundle.config
    return replace(
        command,
        on_bad_image=command.on_bad_image or told.get("on_bad_image"),
        qualify_names=command.qualify_names or told.get("qualify_names", False),
    )


def own_source(run: str, bundle: Bundle) -> str | None:
    """What a run was trained on: where that lay, if it is there, and as it was given else."""
    recipe = Path(run) / "recipe.toml"
    place = load_toml(recipe).get("derived", {}).get(PLACE, {}).get("value") if recipe.is_file() else None
    return place if place and Path(place).exists() else bundle.config.get("source")
