"""What ``nestling train`` chooses by itself: a method, epochs, and how to keep to a time."""

from __future__ import annotations

import time
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.commands.choose import cut_short
from nestling.data.dataset import LabelledData
from nestling.engine.fit import fit
from nestling.engine.plan import StagePlan
from nestling.errors import UsageError
from nestling.methods import EndToEnd
from nestling.methods.choose import RULES, Seen, choose_epochs, choose_method, within
from running import FOUR, QUICK, refuse, succeed, table, tree

LEVELS = ("coarse", "middle", "fine")


@pytest.mark.parametrize(
    ("known", "asked", "method", "fields"),
    [
        ((100, 40, 10), {}, "nested", {}),
        ((100, 100, 1), {}, "nested", {}),
        ((100, 0, 0), {}, "coins", {}),
        ((100, 40, 0), {}, "coins", {"label_level": "middle"}),
        ((0, 0, 0), {}, "nested", {}),
        ((100, 40, 10), {"mix": True}, "robust", {}),
        ((100, 40, 10), {"memory": True}, "layerwise", {}),
        ((100, 0, 0), {"mix": True}, "robust", {}),
    ],
)
def test_the_rule(known: tuple[int, ...], asked: dict[str, bool], method: str, fields: dict[str, Any]) -> None:
    found, more, reason = choose_method(Seen(levels=LEVELS, known=known, **asked))
    assert (found, more) == (method, fields) and len(reason) > 30


def test_no_method_takes_a_limit_on_memory_and_a_mix() -> None:
    with pytest.raises(UsageError, match="--memory asks for layerwise training and --target-mix for robust"):
        choose_method(Seen(levels=LEVELS, known=(9, 9, 9), memory=True, mix=True))


def test_a_single_level_is_learned_as_it_is_and_every_rule_is_reached() -> None:
    assert choose_method(Seen(levels=("kind",), known=(9,)))[0] == "nested"
    assert [rule.method for rule in RULES] == ["layerwise", "robust", "coins", "nested"]


@pytest.mark.parametrize(
    ("method", "rows", "epochs"),
    [
        ("nested", 1000, None),
        ("nested", 50_000, None),
        ("nested", 100_000, (3, 3, 30)),
        ("coins", 100_000, 30),
        ("coins", 10**7, 10),
        ("layerwise", 10**6, None),
    ],
)
def test_epochs_follow_the_rows(method: str, rows: int, epochs: object) -> None:
    """By hand: three million pictures are 30 passes over 100,000 rows."""
    assert choose_epochs(method, rows, 3)[0] == epochs


def test_epochs_within_a_time_by_hand() -> None:
    """70 s are to become 35 s: half of all; of 3 s in place of 70 three short epochs of the longest stage are left."""
    stages = [(3, 100, 10.0), (60, 100, 60.0)]
    assert within(stages, 70) == ((3, 60), None)
    assert within(stages, 35) == ((1, 30), None)
    # 6,000 steps take 60 s, so that 3/70 of them, cut in three, are 85.
    assert within(stages, 3) == ((1, 3), 85)


def test_half_of_the_steps_is_enough_without_a_warning() -> None:
    def stages(steps: int) -> list[StagePlan]:
        return [StagePlan("own", 3, 7, 9, 1, 1, False, follows=False), StagePlan("fine", 1, steps, 9, 1, 1, False)]

    assert cut_short(stages(100), stages(50), 10, 1) == ""
    told = cut_short(stages(100), stages(30), 10, 9)
    assert "30 of 100 steps fit into --minutes 10 for each of 9 trainings" in told and "about 34 minutes" in told


@given(
    st.lists(st.tuples(st.integers(1, 100), st.integers(1, 500), st.floats(0.1, 1e4)), min_size=1, max_size=4),
    st.floats(0, 1e4),
)
def test_no_stage_is_left_without_an_epoch_and_none_takes_longer(
    stages: list[tuple[int, int, float]], budget: float
) -> None:
    epochs, steps = within(stages, budget)
    assert min(epochs) >= 1
    for now, (before, per_epoch, _) in zip(epochs, stages, strict=True):
        assert now * (steps or per_epoch) <= max(before * per_epoch, steps or per_epoch)


def test_coarse_labels_alone_choose_search_and_say_why(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree", FOUR)
    done = succeed("train", source, "--known", "coarse=1,fine=0", "--dry-run", *QUICK, "--out", tmp_path / "run")
    assert "method: coins (no training row is labelled at level 'fine' (rows labelled: coarse" in done.err
    assert "coins on conv:4/8" in done.out and "batch_size" not in done.err
    done = succeed("train", source, "--dry-run", *QUICK[:6], "--out", tmp_path / "run")
    assert "method: nested (rows are labelled at every level (coarse" in done.err
    assert "batch_size: 32 (for " in done.err


def test_a_column_that_is_still_empty_is_a_level_to_come(tmp_path: Path) -> None:
    """Where it is named as one: search learns what would be told apart there."""
    tree(tmp_path / "tree", FOUR)
    files = sorted((tmp_path / "tree").rglob("*.png"))
    source = table(tmp_path / "0.csv", ["path", "kind", "breed"], [[file, file.parent.name, ""] for file in files])
    done = succeed("train", source, "--dry-run", *QUICK, "--out", tmp_path / "run")
    assert "empty in every row, so no level: 'breed'; --levels kind,breed makes a level" in done.err
    assert "method: nested (there is a single level" in done.err
    done = succeed("train", source, "--levels", "kind,breed", "--out", tmp_path / "run", *QUICK)
    assert "method: coins (no training row is labelled at level 'breed' (rows" in done.err
    assert "no row is labelled at 'breed' yet" in done.err
    # Labels that come later are no hindrance to the model, which has none of their classes.
    lines = [[file, file.parent.name, f"{file.parent.name}{number % 2}"] for number, file in enumerate(files)]
    table(source, ["path", "kind", "breed"], lines)
    assert "rows" in succeed("evaluate", tmp_path / "run").out


def test_search_says_which_labels_it_leaves_unused(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree", FOUR)
    command = ("train", source, "--method", "coins", "--dry-run", *QUICK, "--out", tmp_path / "run")
    assert "labelled at level 'fine' too: --set label_level=fine learns from those" in succeed(*command).err
    assert "label_level" not in succeed(*command, "--set", "label_level=fine").err
    assert "label_level" not in succeed(*command, "--known", "coarse=1,fine=0").err


def test_a_mix_chooses_robust_and_memory_layerwise(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree", FOUR)
    mix = table(tmp_path / "mix.csv", ["class", "share"], [["red", 0.3], ["blue", 0.7]])
    out = succeed("train", source, "--target-mix", mix, "--dry-run", *QUICK, "--out", tmp_path / "a")
    assert "robust on conv:4/8" in out.out
    out = succeed("train", source, "--memory", "2GB", "--dry-run", *QUICK, "--out", tmp_path / "b")
    assert "layerwise on conv:4/8" in out.out
    refuse(2, ["above 0"], "train", source, "--minutes", "-1", "--out", tmp_path / "c")
    both = ("--memory", "2GB", "--target-mix", mix, "--dry-run", *QUICK, "--out", tmp_path / "d")
    refuse(2, ["--memory asks for layerwise", "leave one out"], "train", source, *both)


def test_minutes_choose_epochs_and_a_resume_keeps_them(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree", FOUR)
    command = ("train", source, "--method", "end-to-end", *QUICK[:6], "--set", "epochs=100000", "--minutes", "0.1")
    began = time.monotonic()
    planned = succeed(*command, "--dry-run", "--out", tmp_path / "run")
    assert "within the minutes: " in planned.err and "100,000" not in planned.out
    assert "worse than they could be; about " in planned.err
    assert not (tmp_path / "run").exists()
    done = succeed(*command, "--out", tmp_path / "run")
    assert "within the minutes: " in done.err and "measured by a few steps" in done.err
    # A hundred thousand epochs would take hours; how long these took is no test of a busy machine.
    assert time.monotonic() - began < 300
    recipe = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())
    assert "worse than they could be" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    assert recipe["given"]["epochs"] == 100000 and '"epochs": ' in recipe["derived"]["epochs in time"]["value"]
    assert "is finished" in succeed(*command, "--out", tmp_path / "run").err
    refuse(2, ["minutes: 0.1 there, 5"], *command[:-1], "5", "--out", tmp_path / "run")
    refuse(2, ["minutes: 0.1 there, not set now"], *command[:-2], "--out", tmp_path / "run")


def test_minutes_shorten_the_layers_of_layerwise_training(tmp_path: Path) -> None:
    """Whose epochs nothing chooses; tuning after pruning has epochs of its own."""
    source = tree(tmp_path / "tree", FOUR)
    fields = ("epochs=100000", "compression.share=0.25", "steps_per_epoch=1", "batch_size=16", "width=4")
    command = ("train", source, "--method", "layerwise", *QUICK[2:6], "--minutes", "0.1", "--dry-run", "--set", *fields)
    planned = succeed(*command, "--out", tmp_path / "run")
    assert "within the minutes: " in planned.err and "100,000" not in planned.out and "tune-1" in planned.out


def test_a_stage_ends_with_the_epoch_under_way_when_the_time_is_over(toy_data: LabelledData, tmp_path: Path) -> None:
    recipe = EndToEnd(epochs=50, steps_per_epoch=1)
    run = fit(recipe, toy_data, out=tmp_path, device="cpu", backbone="conv:4", deadline=time.monotonic(), verbose=False)
    assert [record["epoch"] for record in run.history if record["stage"] != "temperature"] == [1]
