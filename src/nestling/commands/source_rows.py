"""The rows that ``train`` reads from its source: what is asked of them by options, and what is known of them after."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

import numpy as np

from nestling.bundle import load_bundle
from nestling.data.dataset import LabelledData
from nestling.data.hold_out import hold_out
from nestling.data.sides import Sides
from nestling.data.sources import has_split, load_data
from nestling.taxonomy import Taxonomy


class SourceRows:
    """``train``'s source, split by split, as its options say."""

    def __init__(self, options: Mapping[str, Any], data_dir: str | None) -> None:
        self.options, self.data_dir = options, data_dir
        self.tree: Taxonomy | None = None
        """With the classes that are held out."""
        self.held_out: LabelledData | None = None
        """Test rows of these."""
        self.marks: dict[str, np.ndarray | None] = {}
        """Of all rows, by split."""

    def load_all(self) -> tuple[LabelledData, LabelledData | None, LabelledData]:
        """Training rows, validation rows where the source has some of its own, and test rows."""
        train, validation = self.load_training()
        return train, validation, self.load("test", like=train)

    def load_training(self) -> tuple[LabelledData, LabelledData | None]:
        """Training rows, and validation rows where the source has some of its own."""
        train = self.load("train")
        validation = (
            self.load("validation", like=train)
            if has_split(self.options["source"], "validation", self.data_dir)
            else None
        )
        if self.options.get("known"):
            # Labels that validation rows choose by are part of the budget.
            train, validation = (
                part and part.keep(self.options["known"], self.options["seed"]) for part in (train, validation)
            )
            assert train is not None
        return train, validation

    def load(self, split: str, like: LabelledData | None = None) -> LabelledData:
        """A split of the source; ``like`` the training rows in taxonomy, size and channels."""
        size, channels = self.options.get("image_size"), None
        if like is not None and not isinstance(like.inputs, list):
            channels, height, width = like.image_shape
            size = (height, width)
        taxonomy = self.options.get("taxonomy") if like is None else self.tree
        data = load_data(
            self.options["source"],
            split,
            self.data_dir,
            taxonomy,
            self.levels(like),
            image_size=size,
            channels=channels,
            qualify_names=self.options.get("qualify_names", False),
            on_bad_image=self.options.get("on_bad_image", "error"),
            seed=self.options["seed"],
            concepts=self.options.get("concepts") if like is None or like.concepts is not None else None,
            sides=self.earlier,
        )
        self.tree, self.marks[split] = data.taxonomy, data.marks
        if not self.options.get("hold_out"):
            return data
        data, held = hold_out(data, self.options["hold_out"])
        if split == "test":
            self.held_out = held
        return data

    @cached_property
    def earlier(self) -> Sides | None:
        """The rows of the run that this one begins from: those that it was tested on are no training rows here."""
        return load_bundle(self.options["init"]).sides if self.options.get("init") else None

    def sides(self, *more: np.ndarray) -> Sides | None:
        """The rows that were loaded, where they are marked, with ``more`` that were trained on."""
        test, given = self.marks["test"], [marks for split, marks in self.marks.items() if split != "test"]
        known = [marks for marks in given if marks is not None]
        return None if test is None or len(known) < len(given) else Sides(np.concatenate([*known, *more]), test)

    def levels(self, like: LabelledData | None) -> list[str] | None:
        """The levels that were named; of those that ``like`` was loaded with the ones that have labels."""
        given = self.options.get("levels")
        if given is None or like is None:
            return given
        # Of a folder tree those given are names for its depths, all of which have labels.
        return [level for level in given if level in like.taxonomy.levels]
