"""Labels that are probably wrong: planted ones are found, at their level."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np

from nestling.commands.errors import recipe_of
from nestling.data.dataset import LabelledData
from nestling.evaluate.mistakes import label_mistakes
from nestling.methods.layerwise import Layerwise
from nestling.methods.nested import Nested
from nestling.report.mistakes import Suspect, render_mistakes
from nestling.taxonomy import Taxonomy
from running import FOUR, nestling, picture, refuse, succeed
from test_report import EVIL, Page


def test_by_hand() -> None:
    taxonomy = Taxonomy.from_paths(["a/x", "a/y", "b/z", "b/w"])
    # Classes sorted by parent: x, y under a; w, z under b.
    fine = np.array(
        [[0.8, 0.1, 0.05, 0.05], [0.1, 0.8, 0.05, 0.05], [0.1, 0.8, 0.05, 0.05], [0.0, 0.1, 0.1, 0.8], [0, 0, 0.9, 0.1]]
    )
    coarse = np.stack([fine[:, :2].sum(1), fine[:, 2:].sum(1)], axis=1)
    # Row 2 says x and is y; row 3 says y, of another coarse class; row 4 is known to be of b, and of no more.
    labels = np.array([[0, 0], [0, 1], [0, 0], [0, 1], [1, -1]])
    found = label_mistakes({"coarse": coarse, "fine": fine}, labels, taxonomy)
    # Coarse b is said of row 4 alone, with 1.0, and row 3 is 0.9: it is not as surely b as what is labelled b.
    assert found["coarse"] == []
    labels[4] = [1, 3]
    coarse[4], fine[4] = [0.2, 0.8], [0.1, 0.1, 0.1, 0.7]
    found = label_mistakes({"coarse": coarse, "fine": fine}, labels, taxonomy)
    [mistake] = found["coarse"]
    assert (mistake.row, mistake.given, mistake.suggested) == (3, 0, 1) and abs(mistake.score - 0.8) < 1e-12
    [mistake] = found["fine"]
    # 0.8 of 0.9 for y, 0.1 of 0.9 for x; y is 0.889 on row 1, which is labelled so.
    assert (mistake.row, mistake.level, mistake.given, mistake.suggested) == (2, "fine", 0, 1)
    assert abs(mistake.score - 0.7 / 0.9) < 1e-12


def test_planted_flips_are_found_at_their_level(toy_data: LabelledData) -> None:
    """A good model's probabilities, and 24 labels that were changed: half within the parent, half across."""
    taxonomy, generator = toy_data.taxonomy, np.random.default_rng(0)
    truth = toy_data.labels[:, 2]
    logits = 5 * np.eye(6)[truth] + generator.normal(size=(len(truth), 6))
    fine = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    probabilities = {level: taxonomy.aggregate(fine, level) for level in taxonomy.levels}
    rows = generator.permutation(len(truth))[:24]
    given = truth.copy()
    given[rows[:12]] ^= 1  # owl and wren, carp and pike, ash and oak
    given[rows[12:]] = (truth[rows[12:]] + 4) % 6  # another coarse class, or another middle one
    labels = taxonomy.complete(np.stack([np.full_like(given, -1)] * 2 + [given], axis=1))
    found = label_mistakes(probabilities, labels, taxonomy)
    flagged = {mistake.row: mistake for mistakes in found.values() for mistake in mistakes}
    assert len(set(rows.tolist()) & flagged.keys()) >= 20 and len(flagged) <= 24
    for row in rows.tolist():
        if row not in flagged:
            continue
        right = toy_data.labels[row]
        level = int(np.flatnonzero(labels[row] != right)[0])
        assert flagged[row].level == taxonomy.levels[level] and flagged[row].suggested == right[level]
    scores = [mistake.score for mistake in found["fine"]]
    assert scores == sorted(scores, reverse=True)


def test_the_page_escapes_what_it_shows() -> None:
    suspect = Suspect(np.zeros((1, 8, 8), np.uint8), EVIL, EVIL, "a > b", 0.5)
    page = Page(render_mistakes(EVIL, {"fine": [suspect]}, {"fine": 1200}))
    assert "fine: 1 shown, of 1,200 labels judged" in "".join(page.text)
    assert not any(tag == "script" for tag, _ in page.tags) and sum(tag == "img" for tag, _ in page.tags) == 1


def test_the_command_finds_wrong_rows_of_a_table(tmp_path: Path) -> None:
    """240 pictures of four classes in a table, 8 of whose labels are wrong; five folds judge all training rows."""
    names, wrong = [name.split("/") for name in FOUR], {3, 50, 77, 101, 130, 162, 190, 213}
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["path", "coarse", "fine", "split"])
        for row in range(240):
            kind = row % 4
            picture(tmp_path / f"{row}.png", kind, row, size=8)
            split = "test" if row % 8 >= 6 else "train"
            writer.writerow([f"{row}.png", *names[kind ^ 1 if row in wrong else kind], split])
    run = tmp_path / "run"
    settings = ("--backbone", "conv:8/16", "--precision", "fp32", "--device", "cpu", "--method", "flat-marginal")
    fields = ("--set", "epochs=6", "steps_per_epoch=10", "batch_size=32", "optimizer.lr=0.02", "augmentation=none")
    succeed("train", tmp_path / "rows.csv", *settings, *fields, "--out", run)
    done = succeed("evaluate", run, "--errors", "--json", tmp_path / "found.json", "--html", tmp_path / "page.html")
    found = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["errors"]
    assert "labels are probably wrong" in done.out and all(0 < entry["score"] <= 1 for entry in found)
    # Test rows are 1 in 4; validation and calibration rows were not trained on either.
    assert all(set(entry) == {"item", "level", "given", "suggested", "score"} for entry in found)
    assert Page((tmp_path / "page.html").read_text(encoding="utf-8")).tags

    done = succeed("evaluate", run, "--errors", "--folds", "2", "--json", "-")
    found = json.loads(done.out)["errors"]
    planted = {row for row in wrong if row % 8 < 6}
    rows = {int(Path(entry["item"]).stem) for entry in found[: len(planted)]}
    assert len(rows & planted) >= len(planted) - 1
    assert len(list((run / "folds").glob("2-of-2-*"))) == 1
    refuse(2, ["add --errors"], "evaluate", run, "--folds", "2")
    assert nestling("evaluate", run / "model", "--errors", "--folds", "2").code == 2


def test_folds_train_as_the_run_was_trained() -> None:
    """At the learning rate that baselines were compared at, for the epochs that fit, by the plan that fits."""
    given = {"method": "nested", "source": "rows.csv", "seed": 1, "batch_size": 48, "epochs": 9}
    assert recipe_of(given, {}) == Nested(batch_size=48, epochs=9)
    derived = {
        "learning rate of nested": "0.01",
        "learning rate of end-to-end": "0.1",
        "precision": "fp32",
        "epochs in time": json.dumps({"epochs": [1, 2, 3], "steps_per_epoch": 7}),
    }
    recipe = recipe_of(given, derived)
    assert (recipe.optimizer.lr, recipe.epochs, recipe.steps_per_epoch) == (0.01, (1, 2, 3), 7)
    assert recipe_of(given, {"learning rate of nested": "(0.1, 0.2, 0.3)"}).optimizer.lr == (0.1, 0.2, 0.3)
    plan = {"together": 2, "micro_batch": "None", "recompute": True, "keep_features": False}
    layers = recipe_of({"method": "layerwise", "micro_batch": 8}, plan)
    assert isinstance(layers, Layerwise) and (layers.together, layers.micro_batch) == (2, None)
    assert layers.recompute and not layers.keep_features
    assert recipe_of({"method": "layerwise", "together": 3}, {}) == Layerwise(together=3)
