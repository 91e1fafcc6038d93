"""``--memory``: a budget of bytes decides how the layers train."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from nestling.commands import memory
from nestling.commands.memory import Plan, choose_plan, halved, parse_memory, variants
from nestling.data.dataset import LabelledData
from nestling.engine.count import allocated
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.methods import Layerwise
from nestling.models.build import build_model
from running import refuse, succeed

RECIPE = Layerwise(k=1, width=16, num_blocks=4, downsample_at=(), epochs=1, batch_size=64, norm="none")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("2GB", 2 * 10**9),
        ("500 MB", 500 * 10**6),
        ("1.5GiB", 1.5 * 2**30),
        ("64q", None),
        ("1000", 1000),
        ("3MiB", 3 * 2**20),
    ],
)
def test_sizes(text: str, size: float | None) -> None:
    if size is None:
        with pytest.raises(UsageError, match="give a size such as 2GB"):
            parse_memory(text)
    else:
        assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "0GB", "-1GB", "lots", "2TB", "GB"])
def test_impossible_sizes(text: str) -> None:
    with pytest.raises(UsageError, match="cannot read --memory"):
        parse_memory(text)


def test_candidates_ask_for_less_and_less() -> None:
    assert list(halved(8)) == [8, 4, 2, 1] and list(halved(5)) == [5, 3, 2, 1] and list(halved(1)) == [1]
    found = [(v.micro_batch, v.recompute) for v in variants(RECIPE, 64, keeps=False)]
    assert found == [(None, False), (None, True), (32, False), (32, True), (16, False), (16, True)]
    kept = [(v.micro_batch, v.recompute, v.keep_features) for v in variants(RECIPE, 32, keeps=True)]
    ways = [(recompute, keeps) for recompute in (False, True) for keeps in (True, False)]
    assert kept == [(rows, *way) for rows in (None, 16) for way in ways]


class Need:
    """Stands for the measuring: bytes by the candidate."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, need: Callable[[Layerwise], int]) -> None:
        self.asked: list[Layerwise] = []

        def measured(recipe: Layerwise, *more: object) -> Plan:
            self.asked.append(recipe)
            return Plan(recipe, need(recipe), 1.0 + recipe.recompute + (not recipe.keep_features))

        monkeypatch.setattr(memory, "measured", measured)


def choose(data: LabelledData, budget: int) -> Layerwise:
    """The recipe chosen."""

    def build() -> nn.Module:
        return build_model(data.taxonomy, data.image_shape, "auto", "layerwise", RECIPE.network())

    return choose_plan(RECIPE, build, data, data, Runtime.choose("cpu", "fp32"), budget)[0]  # type: ignore[arg-type]


def test_kept_features_are_given_up_before_layers(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take memory that no smaller batch gives back; without them a step takes longer."""

    def need(recipe: Layerwise) -> int:
        return 100 * recipe.together + 300 * (recipe.keep_features and recipe.together < 4)

    need_of = Need(monkeypatch, need)
    recipe = choose(toy_data, 250)
    assert (recipe.together, recipe.keep_features) == (2, False)
    # With all layers at once there is nothing to keep.
    assert all(r.keep_features for r in need_of.asked if r.together == 4)
    assert choose(toy_data, 500).together == 4 and choose(toy_data, 500).keep_features


def test_the_first_process_chooses(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process measured on its machine counts for nothing, and none asks for a candidate more."""
    said: list[Any] = []
    monkeypatch.setattr(memory.collective, "broadcast_object", lambda value: said.append(value) or value)
    first = Need(monkeypatch, lambda recipe: 100 * recipe.together)
    recipe = choose(toy_data, 250)
    answers = iter(said)
    monkeypatch.setattr(memory.collective, "broadcast_object", lambda value: next(answers))
    other = Need(monkeypatch, lambda recipe: 1)
    assert choose(toy_data, 250) == recipe and recipe.together == 2
    assert other.asked == first.asked and next(answers, None) is None


def test_allocated_is_the_peak() -> None:
    """Of two maps that are there at once, and a third that comes when they are gone."""

    def step() -> None:
        one, two = torch.empty(1000), torch.empty(3000)
        del one, two
        torch.empty(500)

    assert allocated(step, torch.device("cpu")) == 16_000
    weights = nn.Linear(100, 100, bias=False)

    def backward() -> None:
        weights(torch.ones(1, 100)).sum().backward()

    assert allocated(backward, torch.device("cpu")) >= 100 * 100 * 4


def test_the_budget_decides(toy_data: LabelledData) -> None:
    """From all that one could wish for down to nothing: ever fewer bytes, and most layers together within them."""
    runtime = Runtime.choose("cpu", "fp32")

    def chosen(budget: int) -> tuple[Layerwise, str, str]:
        def build() -> nn.Module:
            return build_model(toy_data.taxonomy, toy_data.image_shape, "auto", "layerwise", RECIPE.network())

        return choose_plan(RECIPE, build, toy_data, toy_data, runtime, budget)  # type: ignore[arg-type]

    recipe, text, reason = chosen(10**9)
    assert (recipe.together, recipe.micro_batch, recipe.recompute) == (4, None, False)
    assert text == "all layers together, end-to-end" and "of 1.00 GB" in reason
    with pytest.raises(UsageError, match=r"no plan fits into .* the least is .* raise --memory") as error:
        chosen(1000)
    least = str(error.value).split("raise --memory to ")[1].split(",")[0]
    smallest, text, _ = chosen(parse_memory(least) + 100_000)
    assert smallest.micro_batch is not None or smallest.recompute or smallest.together < 4
    assert Plan(replace_together(smallest, 1), 0, 0.0).text(4).startswith("1 at a time")


def replace_together(recipe: Layerwise, together: int) -> Layerwise:
    from dataclasses import replace

    return replace(recipe, together=together)


TRAIN = (
    *("train", "digits", "--method", "layerwise", "--precision", "fp32", "--device", "cpu"),
    *("--set", "k=1", "width=8", "num_blocks=3", "downsample_at=[]", "epochs=1"),
)


def test_a_run_keeps_its_plan(tmp_path: Path) -> None:
    """Chosen once, said with its reason, and taken again by a resume."""
    run = tmp_path / "run"
    done = succeed(*TRAIN, "--memory", "2MB", "--out", run)
    assert "within 2MB: " in done.err
    settings = tomllib.loads((run / "recipe.toml").read_text())
    assert settings["given"]["memory"] == "2MB"
    assert {"together", "micro_batch", "recompute", "keep_features"} <= settings["derived"].keys()
    assert json.loads((run / "metrics.json").read_text())["method"] == "layerwise"
    planned = succeed(*TRAIN, "--memory", "2MB", "--dry-run", "--out", tmp_path / "other")
    assert "within 2MB: " in planned.err and not (tmp_path / "other").exists()


def test_bad_budgets(tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    refuse(2, ["no plan fits into", "the least is"], *TRAIN, "--memory", "1kB", *out)
    refuse(2, ["cannot read --memory 'much'"], *TRAIN, "--memory", "much", *out)
    refuse(2, ["--memory", "--method layerwise"], "train", "digits", "--method", "nested", "--memory", "1GB", *out)
    assert not (tmp_path / "run").exists()
