"""``train --dry-run`` and what it stands on: plan and estimates, without a file and without a training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from nestling.data.dataset import LabelledData
from nestling.engine.count import Saved
from nestling.engine.estimate import estimate
from nestling.engine.fit import cut_rows
from nestling.engine.plan import plan
from nestling.engine.runtime import Runtime
from nestling.files import TEMPORARY
from nestling.lock import RunLock
from nestling.methods.recipe import Recipe, Stage
from nestling.models.model import Model
from nestling.objectives.terms import CrossEntropy
from running import QUICK, Done, everything, refuse, succeed
from small import BACKBONE, RECIPES, partly_labelled, recipe_of, small_model

CPU = Runtime.choose("cpu", "fp32")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_plan_is_printed_and_nothing_written(here: Path) -> None:
    lines = succeed("train", "digits", *QUICK, "--dry-run").out.splitlines()
    assert lines[0].startswith("nested on conv:4/8, fp32 on cpu")
    assert lines[1].split() == ["stage", "rows", "trainable", "parameters", "epochs", "steps", "batch"]
    assert [line.split()[0] for line in lines[2:6]] == ["coarse", "middle", "fine", "temperature"]
    assert lines[4].split()[3:] == ["1", "2", "16"]
    assert len({len(line) for line in lines[1:6]}) == 1
    assert lines[-3].startswith("memory, estimated: ")
    assert lines[-2].startswith("time, estimated: ")
    assert lines[-1].startswith("measured: 3 steps of each stage on this machine")
    assert everything(here) == []


def test_with_baselines_every_training_is_listed(here: Path) -> None:
    out = succeed("train", "digits", *QUICK, "--baselines", "--dry-run").out
    for method in ("nested", "end-to-end", "flat-marginal"):
        assert f"{method} on conv:4/8, fp32 on cpu, trained at 3 learning rates" in out
    given = succeed("train", "digits", *QUICK, "--set", "optimizer.lr=0.01", "--baselines", "--dry-run").out
    assert "nested on conv:4/8, fp32 on cpu\n" in given


def test_what_training_refuses_a_dry_run_refuses(here: Path) -> None:
    for wrong in (
        ("digit",),
        ("digits", "--set", "epochs=0"),
        ("digits", "--set", "epochs=[1, 2]"),
        ("digits", "--backbone", "conv:4/8/8/8/8/8"),
        ("digits", "--known", "fine=2"),
    ):
        assert refuse(2, [], "train", *wrong, "--dry-run") == refuse(2, [], "train", *wrong)
    assert everything(here) == []


def test_a_run_that_was_begun_is_left_as_it_is(here: Path) -> None:
    """To its last leftover, and it is said whether it is finished."""
    succeed("train", "digits", *QUICK, "--out", "run")
    (here / "run" / f"{TEMPORARY}left").write_text("by a kill")

    def written() -> dict[Path, int]:
        # The lock's file names whoever held it last.
        return {p: p.stat().st_mtime_ns for p in (here / "run").rglob("*") if p.name != "run.lock"}

    before = written()
    done = succeed("train", "digits", *QUICK, "--out", "run", "--dry-run")
    assert "run holds a run of these settings, which is finished; this is the whole of it" in done.err
    assert written() == before
    (here / "run" / "report.html").unlink()
    before = written()
    done = succeed("train", "digits", *QUICK, "--out", "run", "--dry-run")
    assert "run holds a run of these settings, which a training goes on with; this is the whole of it" in done.err
    assert written() == before
    refuse(2, ["seed"], "train", "digits", *QUICK, "--seed", "1", "--out", "run", "--dry-run")


def test_of_several_processes_one_answers(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others leave even the lock to it."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with RunLock("run"):
        assert succeed("train", "digits", *QUICK, "--out", "run", "--dry-run") == Done(0, "", "")
    monkeypatch.setenv("RANK", "0")
    assert "memory, estimated: " in succeed("train", "digits", *QUICK, "--out", "run", "--dry-run").out


@pytest.mark.parametrize("name", RECIPES)
def test_every_method_is_estimated(name: str, toy_data: LabelledData) -> None:
    recipe = RECIPES[name]
    train, validation = cut_rows(partly_labelled(toy_data), None, 0)
    model = small_model(toy_data, method=recipe.method)
    planned = plan(recipe, model, train)
    found = estimate(recipe, model, train, validation, CPU)
    assert [e.name for e in found] == [s.name for s in planned]
    for stage, e in zip(planned, found, strict=True):
        assert e.gradients == (4 * stage.num_trainable if stage.epochs else 0)
        assert (e.seconds > 0) == (e.activations > 0) == (stage.epochs > 0)
        assert e.memory == e.parameters + e.optimizer + e.peak
        assert e.peak >= max(e.gradients, e.activations)


def test_activations_are_counted_once_and_weights_not() -> None:
    linear = nn.Linear(8, 4, bias=False)
    inputs = torch.ones(16, 8)
    saved = Saved([linear.weight])
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda tensor: tensor):
        # The inputs serve both; the weights' gradient needs them alone, the square what it squares.
        (linear(inputs).square().sum() + linear(inputs).sum()).backward()
    assert saved.bytes == 4 * (16 * 8 + 16 * 4)
    assert linear.weight.grad is not None


def test_what_a_hook_would_do_is_assumed(toy_data: LabelledData) -> None:
    """A stage that follows a hook which changes shapes is planned, and measured, on those that are assumed."""

    def shrink(model: Model) -> str:
        head = model.head["fine"]  # type: ignore[index]
        device = head.weight.device
        model.extra = nn.Linear(6, 3, device=device)
        return "half of the classes remain"

    def stages(recipe: Recipe, model: Model, data: LabelledData) -> Iterator[Stage]:
        first = Stage(
            name="first",
            data=data,
            objective=CrossEntropy("fine"),
            trainable=[model.head["fine"]],  # type: ignore[index]
            optimizer=recipe.optimizer,
            lr=0.01,
            epochs=1,
            batch_size=16,
            assume=shrink,
        )
        yield first
        assert isinstance(model.extra, nn.Linear)
        yield replace(first, name="second", assume=None)

    recipe, model = recipe_of(stages), small_model(toy_data)
    planned = plan(recipe, model, toy_data)
    assert [s.assumes for s in planned] == ["half of the classes remain", None]
    first, second = estimate(recipe, model, toy_data, toy_data, CPU)
    assert second.parameters - first.parameters == 4 * (6 * 3 + 3)
    assert BACKBONE in model.config["backbone"]
