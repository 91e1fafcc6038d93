"""``nestling sweep``: what is searched and by what, trials as run folders, going on, and what is refused."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestling.commands import pipeline, source_rows
from nestling.commands.judges import ByRule
from nestling.commands.sweep import ranges_of
from nestling.config import load_toml
from nestling.data.sources import load_data
from nestling.engine.fit import cut_rows
from nestling.errors import DivergedError, UsageError
from nestling.evaluate.choice import RULES
from nestling.evaluate.retrieval import recall_at_k
from nestling.files import read_lines
from nestling.methods.coins import LAMBDAS
from running import nestling, refuse, succeed, table
from small import Watch

pytest.importorskip("optuna")

QUICK = ("--backbone", "conv:4/8", "--precision", "fp32", "--device", "cpu")
SMALL = (*QUICK, "--set", "epochs=2", "steps_per_epoch=3", "batch_size=16", "augmentation=none")
SWEEP = ("sweep", "digits", "--method", "robust", *SMALL)


def content(out: Path) -> dict[str, Any]:
    return json.loads((out / "sweep.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trials on the digits."""
    out = tmp_path_factory.mktemp("sweep") / "whole"
    succeed(*SWEEP, "--trials", 3, "--out", out)
    return out


def test_what_comes_out(unbroken: Path) -> None:
    """Every trial in its range, with the score of its run folder's best epoch; the best of them stands out."""
    found = content(unbroken)
    assert (found["metric"], found["mode"]) == ("worst concept's accuracy", "max")
    assert [trial["number"] for trial in found["trials"]] == [0, 1, 2]
    assert len({trial["fields"]["tau"] for trial in found["trials"]}) == 3
    for trial in found["trials"]:
        assert trial["fields"].keys() == {"tau", "strength"}
        assert all(1e-3 <= value <= 10 for value in trial["fields"].values())
        folder = unbroken / trial["folder"]
        given = load_toml(folder / "recipe.toml")["given"]
        assert {name: given[name] for name in trial["fields"]} == trial["fields"]
        assert len(read_lines(folder / "metrics.jsonl")) > 0
        assert not (folder / "metrics.json").exists(), "test rows were looked at"
    best = max(found["trials"], key=lambda trial: trial["value"])
    assert found["best"]["value"] == best["value"] > 0
    assert (unbroken / "sweep.png").read_bytes().startswith(b"\x89PNG")
    said = succeed("show", unbroken).out
    assert "3 trials; worst concept's accuracy on validation rows" in said


def test_the_best_is_a_configuration(unbroken: Path, tmp_path: Path) -> None:
    succeed("train", "--config", unbroken / "best.toml", *QUICK, "--out", tmp_path / "run")
    given = load_toml(tmp_path / "run" / "recipe.toml")["given"]
    assert {name: given[name] for name in ("tau", "strength")} == content(unbroken)["best"]["fields"]
    assert given["epochs"] == 2 and given["source"] == "digits" and "searched" not in given


def test_the_same_command_goes_on(unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Broken off inside the second trial, then again: the same trials and scores as of the unbroken one."""
    watch = Watch(monkeypatch)
    out = tmp_path / "broken"
    for stop in (8, 9):
        watch.taken.clear()
        watch.stop_at = stop
        assert nestling(*SWEEP, "--trials", 3, "--out", out).code == 128 + 15
    watch.taken.clear()
    watch.stop_at = None
    done = succeed(*SWEEP, "--trials", 3, "--out", out)
    assert "resumed stage robust" in done.err and len(watch.taken) < 3 * 6
    keys = ("number", "fields", "value")
    one, other = ([{key: t[key] for key in keys} for t in content(run)["trials"]] for run in (out, unbroken))
    assert one == other
    # Finished, it trains nothing; with more trials it goes on.
    watch.taken.clear()
    succeed(*SWEEP, "--trials", 3, "--out", out)
    assert watch.taken == []
    succeed(*SWEEP, "--trials", 4, "--out", out)
    assert len(watch.taken) == 6 and len(content(out)["trials"]) == 4
    refuse(2, ["epochs: 2 there, 3 now"], *SWEEP, "epochs=3", "--trials", 3, "--out", out)


def test_two_folders_share_a_database(tmp_path: Path) -> None:
    """As two machines would: trials of both count, and each trains its own."""
    options = ("--storage", f"sqlite:///{tmp_path / 'shared.db'}", "--trials")
    succeed(*SWEEP, *options, 2, "--out", tmp_path / "one")
    succeed(*SWEEP, *options, 3, "--out", tmp_path / "other")
    assert [trial["folder"] for trial in content(tmp_path / "other")["trials"]] == [None, None, "trials/0002"]
    assert [path.name for path in sorted((tmp_path / "one" / "trials").iterdir())] == ["0000", "0001"]


def test_machines_of_the_same_layout_share_a_database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A trial that runs in a folder of the same path elsewhere is not one's own, and goes on there."""
    watch = Watch(monkeypatch)
    options = ("--storage", f"sqlite:///{tmp_path / 'shared.db'}", "--out", tmp_path / "sweep")
    watch.stop_at = 4
    assert nestling(*SWEEP, *options, "--trials", 2).code == 128 + 15
    (tmp_path / "sweep").rename(tmp_path / "of the first machine")
    watch.stop_at = None
    succeed(*SWEEP, *options, "--trials", 1)
    assert [trial["folder"] for trial in content(tmp_path / "sweep")["trials"]] == ["trials/0001"]
    (tmp_path / "sweep").rename(tmp_path / "of the second machine")
    (tmp_path / "of the first machine").rename(tmp_path / "sweep")
    succeed(*SWEEP, *options, "--trials", 2)
    assert [trial["folder"] for trial in content(tmp_path / "sweep")["trials"]] == ["trials/0000", None]


def test_a_trial_that_was_told_already_keeps_its_score(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optuna

    fit, store = pipeline.Pipeline.fit, f"sqlite:///{tmp_path / 'shared.db'}"

    def told_meanwhile(*arguments: Any) -> Any:
        run = fit(*arguments)
        optuna.load_study(study_name=None, storage=store).tell(0, 0.125)
        return run

    monkeypatch.setattr(pipeline.Pipeline, "fit", told_meanwhile)
    succeed(*SWEEP, "--storage", store, "--trials", 1, "--out", tmp_path / "run")
    assert content(tmp_path / "run")["best"]["value"] == 0.125


def test_a_trial_that_diverges_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fit, calls = pipeline.Pipeline.fit, iter(range(100))

    def first_diverges(*arguments: Any) -> Any:
        if next(calls) == 0:
            raise DivergedError("the loss is not finite")
        return fit(*arguments)

    monkeypatch.setattr(pipeline.Pipeline, "fit", first_diverges)
    done = succeed(*SWEEP, "--trials", 2, "--out", tmp_path / "run")
    assert "the loss is not finite" in done.err and "1 trials, and 1 diverged" in done.out
    assert [trial["value"] is None for trial in content(tmp_path / "run")["trials"]] == [True, False]


def test_ranges() -> None:
    assert ranges_of("robust", {}) == {"tau": (1e-3, 10.0), "strength": (1e-3, 10.0)}
    assert ranges_of("robust", {"strength": "off"}).keys() == {"tau"}
    # What has no effect is not searched.
    assert ranges_of("robust", {"ascent": "group-dro"}) == {"tau": (1e-3, 10.0), "eta": (1e-4, 1.0)}
    assert ranges_of("robust", {"smoothness": 2.0}).keys() == {"strength"}
    with pytest.raises(UsageError, match="with these settings robust declares no field"):
        ranges_of("robust", {"smoothness": 2.0, "strength": "off"})
    assert ranges_of("end-to-end", {}) == {"optimizer.lr": (1e-4, 1e-1)}


def test_test_rows_are_not_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And other methods search their learning rate by the loss that chooses their epochs."""
    load, splits = source_rows.load_data, []

    def note(source: str, split: str, *more: Any, **options: Any) -> Any:
        splits.append(split)
        return load(source, split, *more, **options)

    monkeypatch.setattr(source_rows, "load_data", note)
    succeed("sweep", "digits", "--method", "end-to-end", *SMALL, "--trials", 1, "--out", tmp_path / "run")
    assert splits == ["train"]
    found = content(tmp_path / "run")
    assert (found["metric"], found["mode"]) == ("validation loss", "min")
    assert found["best"]["fields"].keys() == {"optimizer.lr"}


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = ("--out", tmp_path / "run")
    refuse(2, ["--trials must be at least 1, got 0"], *SWEEP, "--trials", 0, *out)
    refuse(
        2,
        ["nothing to search: with these settings robust declares tau, strength"],
        *SWEEP,
        "tau=0.5",
        "strength=1",
        *out,
    )
    refuse(2, ["unknown method robst"], "sweep", "digits", "--method", "robst", *out)
    refuse(2, ["keeps its last epoch"], "sweep", "digits", "--method", "layerwise", *QUICK, *out)
    mix = table(tmp_path / "mix.csv", ["class", "share"], [("nobody", 1)])
    refuse(2, ["unknown concept of the prior"], *SWEEP, "--target-mix", mix, *out)
    assert not (tmp_path / "run").exists()
    refuse(5, ["cannot use the store sqlite:////nowhere", "check --storage"], *SWEEP, "--storage",
           "sqlite:////nowhere/at/all.db", *out)  # fmt: skip
    original = builtins.__import__

    def without(name: str, *arguments: Any, **options: Any) -> Any:
        if name.split(".")[0] == "optuna":
            raise ImportError(name)
        return original(name, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    refuse(2, ["nestling sweep needs the package 'optuna'", "nestling[sweep]"], *SWEEP, "--out", tmp_path / "other")
    assert not (tmp_path / "other").exists()


COINS = ("sweep", "digits", "--method", "coins", *SMALL)


def test_lambda_is_chosen_by_a_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each value of the grid once, from the recipe's own outwards; the largest that costs less than a point wins."""
    recalls = {0.5: 0.991, 1.0: 0.96, 0.1: 0.999, 5.0: 0.4, 0.05: 1.0, 0.01: 1.0}
    monkeypatch.setattr(pipeline.Pipeline, "fit", lambda self, recipe, *more: recipe)
    monkeypatch.setattr(ByRule, "score", lambda self, recipe: recalls[recipe.instance_weight])
    out = tmp_path / "run"
    first = succeed(*COINS, "--trials", 2, "--out", out)
    assert "trial 2 of 2 (number 1)" in first.err
    done = succeed(*COINS, "--out", out)
    found = content(out)
    assert [trial["fields"]["instance_weight"] for trial in found["trials"]] == list(LAMBDAS)
    assert (found["metric"], found["mode"], found["rule"]) == ("coarse R@1", "max", "within a point")
    assert found["choices"] == {"the paper's rule": 0.01, "within a point": 0.5, "within a standard error": 0.05}
    assert found["best"]["fields"] == {"instance_weight": 0.5}
    assert load_toml(out / "best.toml")["given"]["instance_weight"] == 0.5
    assert "trial 0 is chosen, within a point; instance_weight by the paper's rule: 0.01" in done.out
    assert "trial 0 is chosen" in succeed("show", out).out


def test_the_score_of_lambda_is_the_coarse_recall_of_validation_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, runs = pipeline.Pipeline.fit, []
    monkeypatch.setattr(pipeline.Pipeline, "fit", lambda *given: runs.append(fit(*given)) or runs[-1])
    succeed(*COINS, "epochs=1", "--trials", 1, "--out", tmp_path / "run")
    _, validation = cut_rows(load_data("digits", "train"), None, 0)
    with torch.no_grad():
        features = runs[0].model(runs[0].preprocessing(validation.images(np.arange(len(validation))))).embedding
    expected = recall_at_k(features, torch.from_numpy(validation.labels[:, 0]), (1,))[1]
    (trial,) = content(tmp_path / "run")["trials"]
    assert trial["value"] == pytest.approx(expected) and 0 < expected <= 1


def test_rules_by_hand() -> None:
    """Of 100 validation rows: the best is 0.97, whose standard error is 0.017; a point below is 0.96."""
    recalls = {0.01: 0.95, 0.1: 0.97, 0.5: 0.96, 1.0: 0.955, 5.0: 0.9}
    assert {name: rule(recalls, 100) for name, rule in RULES.items()} == {
        "the paper's rule": 0.1, "within a point": 0.5, "within a standard error": 1.0,
    }  # fmt: skip
    assert RULES["the paper's rule"]({0.5: 1.0, 0.1: 1.0}, 10) == 0.1


def test_where_no_lambda_is_to_be_chosen(tmp_path: Path) -> None:
    assert ranges_of("coins", {}) == {"instance_weight": LAMBDAS}
    out = ("--out", tmp_path / "run")
    for variant in ("cos", "ins", "supcon", "opt"):
        refuse(2, ["nothing to search", "coins declares no field"], *COINS, f"variant={variant}", *out)
    refuse(2, ["declares instance_weight, and all of them are set"], *COINS, "instance_weight=1.0", *out)
