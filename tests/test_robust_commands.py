"""Robust training on the command line: concepts and mixes from files, fine-tuning, figures, and what is refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nestling import from_pretrained, load_data
from nestling.bundle import load_bundle
from nestling.data.dataset import LabelledData
from nestling.data.hold_out import hold_out
from nestling.engine.runtime import Runtime
from nestling.errors import DataError, StorageError, UsageError
from nestling.evaluate.concepts import concept_accuracies
from nestling.evaluate.measure import mean_over_seeds
from nestling.evaluate.moved import accuracy_by_step, moved_outputs
from nestling.methods.concepts import concept_table
from nestling.methods.robust import Robust
from nestling.models.nested import NestedModel
from running import FOUR, QUICK, refuse, same, succeed, table, tree
from small import small_model

ROBUST = ("--method", "robust", *QUICK)
CONCEPTS = [("a", "warm"), ("b", "cold"), ("c", "cold"), ("d", "warm")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("robust")


@pytest.fixture(scope="module")
def flat(place: Path) -> Path:
    """Pictures of four classes, without a tree; and their concepts, which no folder says."""
    table(place / "concepts.csv", ["class", "concept"], CONCEPTS)
    return tree(place / "pictures", {name.split("/")[1]: count for name, count in FOUR.items()})


@pytest.fixture(scope="module")
def run(place: Path, flat: Path) -> Path:
    """A robust run on concepts from a file, towards a target whose mix is known."""
    mix = table(place / "mix.csv", ["class", "share"], [("warm", 0.25), ("cold", 0.75)])
    out = place / "run"
    succeed("train", flat, *ROBUST, "--concepts", place / "concepts.csv", "--target-mix", mix, "--out", out)
    return out


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8"))


def test_concepts_from_a_file_are_a_level(run: Path, flat: Path, place: Path) -> None:
    figures = content(run / "metrics.json")
    assert figures["levels"][0]["name"] == "concept"
    found = figures["concepts"]
    assert found["level"] == "concept" and found["accuracy"].keys() == {"warm", "cold"} == found["n"].keys()
    assert list(found["accuracy"].values()) == sorted(found["accuracy"].values())
    config = content(run / "model" / "config.json")
    assert config["concepts"]["level"] == "concept" and set(config["concepts"]["rows"]) == {"warm", "cold"}
    # The bundle stands by itself: neither the file nor the pictures name concepts.
    predictor = from_pretrained(run)
    assert predictor.taxonomy.classes["concept"] == ("cold", "warm")
    (answer,) = predictor.predict([str(next(flat.rglob("*.png")))])
    assert answer["path"][0] in ("cold", "warm")
    data = load_data(flat, concepts=place / "concepts.csv")
    above = dict(CONCEPTS)
    names = [data.taxonomy.classes[level] for level in data.taxonomy.levels]
    assert {(names[1][fine], names[0][coarse]) for coarse, fine in data.labels.tolist()} == set(above.items())
    assert any("2 concepts of" in note for note in data.notes)


def test_what_the_other_commands_say_of_it(run: Path) -> None:
    for command in ("evaluate", "show"):
        said = succeed(command, run).out
        assert "hierarchical" in said and "concepts of concept: mean" in said and "least accurate: " in said, command
    scored = json.loads(succeed("evaluate", run, "--json", "-").out)
    assert scored["concepts"] == content(run / "metrics.json")["concepts"]
    report = (run / "report.html").read_text(encoding="utf-8")
    assert 'id="concepts"' in report
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    assert "qian2020hierarchically" in card


def test_the_mix_stands_in_the_settings(run: Path, flat: Path, place: Path) -> None:
    """Which go on, and are a configuration, without the file; another mix is another setting."""
    recipe = (run / "recipe.toml").read_text(encoding="utf-8")
    assert 'prior = ["warm=0.25", "cold=0.75"]' in recipe
    q = [json.loads(line)["reducers"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert q and all(sum(weights.values()) == pytest.approx(1) for step in q for weights in step.values())
    again = succeed("train", flat, "--config", run / "recipe.toml", "--out", run)
    assert "is finished" in again.err
    other = table(place / "other.csv", ["class", "share"], [("warm", 0.5), ("cold", 0.5)])
    options = ("--concepts", place / "concepts.csv", "--target-mix", other, "--out", run)
    refuse(2, ["prior"], "train", flat, *ROBUST, *options)


def test_baselines_on_the_same_network(flat: Path, place: Path) -> None:
    """One softmax on the backbone, without nested learning's decoder; their concepts are scored too."""
    options = ("--concepts", place / "concepts.csv", "--baselines", "--out", place / "compared")
    succeed("train", flat, *ROBUST, "optimizer.lr=0.01", *options)
    figures = content(place / "compared" / "metrics.json")
    assert figures["methods"].keys() == {"end-to-end", "flat-marginal", "flat-crm"}
    assert all(entry["concepts"]["level"] == "concept" for entry in figures["methods"].values())
    recipes = [path.read_text() for path in (place / "compared" / "methods").glob("*/recipe.toml")]
    assert len(recipes) == 7 and sum("plain = true" in text for text in recipes) == 6


def test_a_robust_run_that_is_broken_off(flat: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a signal after each of two steps: it ends bit for bit in the same, q with it."""
    from small import Watch

    options = (*ROBUST, "schedule=auto", "epochs=3", "steps_per_epoch=6", "--concepts", place / "concepts.csv")
    succeed("train", flat, *options, "--out", place / "whole")
    watch = Watch(monkeypatch)
    for stop in (4, 13):
        watch.taken.clear()
        watch.stop_at = stop if stop == 4 else stop - 4
        from running import nestling

        assert nestling("train", flat, *options, "--out", place / "broken").code == 128 + 15
    watch.stop_at = None
    succeed("train", flat, *options, "--out", place / "broken")
    same(place / "broken", place / "whole")


# Fine-tuning ---------------------------------------------------------------------------------------------------------


def test_a_training_starts_from_another_run(run: Path, place: Path) -> None:
    """Its backbone, under a new head and for other classes."""
    source = tree(place / "others", {"x": 12, "y": 12, "z": 12})
    out = place / "tuned"
    options = ("--precision", "fp32", "--device", "cpu", "--set", "epochs=1", "steps_per_epoch=1", "batch_size=8")
    still = ("optimizer.name=sgd", "optimizer.lr=1e-12", "optimizer.weight_decay=0.0")
    for method, more in (("robust", ()), ("end-to-end", ("plain=true",)), ("nested", ())):
        arguments = ("train", source, "--method", method, "--init", run, *options, *still, *more)
        succeed(*arguments, "--out", out / method)
        given, tuned = load_bundle(run).model, load_bundle(out / method).model
        assert from_pretrained(out / method).init == str(run)
        assert isinstance(given, NestedModel) and isinstance(tuned, NestedModel)
        assert tuned.config["backbone"] == "conv:4/8" and tuned.taxonomy.levels != given.taxonomy.levels
        for (name, mine), theirs in zip(tuned.backbone.named_parameters(), given.backbone.parameters(), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-6, msg=name)
        assert "is finished" in succeed(*arguments, "--out", out / method).err


def test_what_cannot_be_started_from(run: Path, place: Path, flat: Path) -> None:
    init = ("--init", run, "--out", place / "refused")
    plain = ("train", flat, "--precision", "fp32", "--device", "cpu")
    refuse(2, ["has the backbone 'conv:4/8', not 'conv:8/16'"], *plain, "--backbone", "conv:8/16", *init)
    refuse(2, ["does not fit: ", "with norm = 'none'"], *plain, *init, "--set", "norm=none")
    refuse(2, ["--init gives a backbone of stages", "layerwise"], *plain, "--method", "layerwise", *init)
    refuse(2, ["there is no run"], *plain, "--init", place / "nothing", "--out", place / "refused")
    assert not (place / "refused").exists()


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("header", "lines", "code", "parts"),
    [
        (
            ["class", "concept"],
            [("a", "x"), ("b", "x"), ("c", "y")],
            3,
            ["names no concept for 'd'", "drop their rows"],
        ),
        (["class", "concept"], [*CONCEPTS, ("e", "y")], 3, ["unknown class of the column", "'a', 'b', 'c', 'd'"]),
        (["class", "concept"], [*CONCEPTS, ("a", "y")], 3, ["the class 'a' stands there twice"]),
        (["class", "concept"], [*CONCEPTS[:3], ("d", "")], 3, ["neither may be empty"]),
        (["name", "concept"], CONCEPTS, 3, ["expected the columns class,concept; got name,concept"]),
        (["class", "concept"], [], 3, ["a header and no rows"]),
    ],
)
def test_wrong_concepts(
    header: list[str], lines: list[tuple[str, str]], code: int, parts: list[str], flat: Path, tmp_path: Path
) -> None:
    file = table(tmp_path / "concepts.csv", header, lines)
    refuse(code, [*parts], "train", flat, *ROBUST, "--concepts", file, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("lines", "code", "parts"),
    [
        ([("warm", 0.5), ("cold", 0.6)], 2, ["the shares of the prior must sum to 1, got 1.1"]),
        ([("warm", 0.5), ("could", 0.5)], 2, ["unknown concept of the prior", "could", "Did you mean 'cold'?"]),
        ([("warm", "half"), ("cold", 0.5)], 2, ["prior must hold CONCEPT=SHARE", "warm=half"]),
    ],
)
def test_wrong_mixes(lines: list[Any], code: int, parts: list[str], flat: Path, place: Path, tmp_path: Path) -> None:
    mix = table(tmp_path / "mix.csv", ["class", "share"], lines)
    options = ("--concepts", place / "concepts.csv", "--target-mix", mix, "--out", tmp_path / "run")
    refuse(code, parts, "train", flat, *ROBUST, *options)
    assert not (tmp_path / "run").exists()


def test_other_wrong_words(flat: Path, place: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    mix = table(tmp_path / "mix.csv", ["class", "share"], [("a", 1)])
    refuse(2, ["which nested has not"], "train", flat, "--method", "nested", *QUICK, "--target-mix", mix, *out)
    refuse(2, ["there is no file", "class,concept"], "train", flat, *ROBUST, "--concepts", "nothing.csv", *out)
    refuse(2, ["there is no file", "class,share"], "train", flat, *ROBUST, "--target-mix", "nothing.csv", *out)
    refuse(2, ["strength, lambda, must be above 0, got 0"], "train", flat, *ROBUST, "strength=0", *out)
    refuse(2, ["tau must be at least 0, got -1"], "train", flat, *ROBUST, "tau=-1", *out)
    twice = table(tmp_path / "named.csv", ["path", "concept", "fine"], [(next(flat.rglob("*.png")), "x", "y")] * 3)
    refuse(2, ["has a column 'concept' already"], "train", twice, *ROBUST, "--concepts", place / "concepts.csv", *out)
    tree_file = tmp_path / "tree.json"
    load_data(flat).taxonomy.save(tree_file)
    both = ("--taxonomy", tree_file, "--concepts", place / "concepts.csv")
    refuse(2, ["concepts come from one file"], "train", flat, *ROBUST, *both, *out)


def test_rows_without_a_concept(flat: Path, place: Path, tmp_path: Path) -> None:
    """Known to a level that the file says nothing of: drop or name them."""
    pictures = sorted(flat.rglob("*.png"))
    lines = [(path, "k", "" if number % 4 == 0 else path.parent.name) for number, path in enumerate(pictures)]
    source = table(tmp_path / "rows.csv", ["path", "kind", "fine"], lines)
    options = ("--concepts", place / "concepts.csv", "--levels", "fine", "--out", tmp_path / "run")
    # Without any label a row does not count; with a coarser one it has a value, and no concept.
    succeed("train", source, *ROBUST, *options)
    wrong = (*ROBUST, "concept_level=fine", "--levels", "kind,fine", "--out", tmp_path / "other")
    refuse(3, ["training rows have no concept", "level 'fine'", "drop these rows"], "train", source, *wrong)


@pytest.fixture(scope="module")
def across(flat: Path, place: Path) -> Path:
    """A table of the pictures, with cameras that know nothing of classes; some are of test rows alone, or not noted."""
    lines = []
    for number, path in enumerate(sorted(flat.rglob("*.png"))):
        test = number % 5 == 0
        camera = ("unseen", "", "old")[number % 3] if test else ("old", "new", "new")[number % 3]
        lines.append((path, path.parent.name, camera, "test" if test else "train"))
    return table(place / "cameras.csv", ["path", "fine", "camera", "split"], lines)


def cameras(data: LabelledData, source: Path) -> None:
    """Whether every row has the camera that stands beside its picture in the table."""
    with source.open(newline="", encoding="utf-8") as file:
        noted = {line["path"]: line["camera"] for line in csv.DictReader(file)}
    codes, names = data.concepts_at("camera")
    found = ["" if code < 0 else names[code] for code in codes.tolist()]
    assert found == [noted[item] for item in data.items] and len(found) > 3


def test_every_row_keeps_its_camera(across: Path, tmp_path: Path) -> None:
    """Where rows are cut, chosen, left out, held out, reordered."""
    for options in ({}, {"split": "test"}, {"split": "all"}, {"first": 7}):
        cameras(load_data(across, concepts="camera", **options), across)
    data = load_data(across, concepts="camera")
    assert data.taxonomy.levels == ("fine",) and data.concepts is not None
    assert data.concepts.names == ("new", "old", "unseen")
    cameras(data.subset([9, 3, 0, 5]), across)
    for part in hold_out(data, ["fine=a"]):
        cameras(part, across)
    with across.open(newline="", encoding="utf-8") as file:
        lines = [[row["path"], row["fine"], row["camera"]] for row in csv.DictReader(file)]
    (tmp_path / "broken.png").write_bytes(b"no picture")
    lines.insert(4, [str(tmp_path / "broken.png"), "a", "broken"])
    uncut = table(tmp_path / "uncut.csv", ["path", "fine", "camera"], lines)
    for split in ("train", "test"):
        cameras(load_data(uncut, split, concepts="camera", on_bad_image="skip"), uncut)


def test_a_column_that_is_no_level(across: Path, place: Path, tmp_path: Path) -> None:
    """Its values are weighted, choose the epoch and are scored, of every method; the tree knows nothing of them."""
    mix = table(tmp_path / "mix.csv", ["class", "share"], [("old", 0.75), ("new", 0.25)])
    out = tmp_path / "run"
    options = ("--concepts", "camera", "--target-mix", mix, "--baselines", "--out", out)
    said = succeed("train", across, *ROBUST, "optimizer.lr=0.01", *options).err
    assert "3 concepts from the column 'camera', which is no level" in said and "not weighted" not in said
    figures = content(out / "metrics.json")
    rows = load_data(across, "test", concepts="camera")
    codes, names = rows.concepts_at("camera")
    count = dict(zip(names, np.bincount(codes[codes >= 0], minlength=3).tolist(), strict=True))
    # Test rows show a camera that no training row is of: it is scored. Those without one are not.
    assert figures["concepts"]["n"] == {name: n for name, n in count.items() if n} and count["unseen"] > 0
    assert sum(count.values()) < len(rows) and figures["concepts"]["level"] == "camera"
    assert [level["name"] for level in figures["levels"]] == ["fine"]
    assert all(entry["concepts"]["level"] == "camera" for entry in figures["methods"].values())
    q = [json.loads(line)["reducers"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(weights.keys() == {"old", "new"} for step in q for weights in step.values())
    remembered = content(out / "model" / "config.json")["concepts"]
    assert remembered["column"] and 0 < remembered["rows"]["old"] < remembered["rows"]["new"]
    assert json.loads(succeed("evaluate", out, "--json", "-").out)["concepts"] == figures["concepts"]
    # Where nobody noted the camera, it is scored without.
    plain = table(tmp_path / "plain.csv", ["path", "fine"], [(next(place.rglob("*.png")), "a")] * 3)
    alone = succeed("evaluate", out, "--source", plain, "--split", "all", "--json", "-").out
    assert "concepts" not in json.loads(alone)
    assert "is finished" in succeed("train", across, "--config", out / "recipe.toml", "--out", out).err


def test_a_method_that_weights_no_concepts_scores_them(across: Path, tmp_path: Path) -> None:
    options = ("--method", "end-to-end", *QUICK, "--concepts", "camera", "--out", tmp_path / "run")
    said = succeed("train", across, *options).err
    assert "the concepts of 'camera' are scored and not weighted: --method robust weights them" in said
    assert "unseen" in content(tmp_path / "run" / "metrics.json")["concepts"]["accuracy"]


def test_a_concept_that_few_rows_show_is_not_weighted_where_it_is_missing(across: Path) -> None:
    """A level's class without a row is refused; of a column it may be that of test rows, or of another fold."""
    data = load_data(across, concepts="camera")
    rows = np.flatnonzero(data.concepts_at("camera")[0] == 1)
    made = concept_table(data, rows, "camera", batch_size=8, balance="rows")
    assert made.names == ("old",) and made.counts.tolist() == [len(rows)] and made.prior.tolist() == [1.0]
    assert made.concept_of[torch.from_numpy(data.index[rows])].tolist() == [0] * len(rows)
    stages = Robust(prior=("unseen=1",), epochs=1).stages(small_model(data, method="robust"), data)
    with pytest.raises(UsageError, match="unknown concept of the prior at level 'camera' unseen"):
        next(iter(stages))


def test_nested_weights_a_column_too(across: Path, tmp_path: Path) -> None:
    options = ("--method", "nested", *QUICK, "concept_weights=camera", "--concepts", "camera")
    succeed("train", across, *options, "--out", tmp_path / "run")
    assert content(tmp_path / "run" / "metrics.json")["concepts"]["level"] == "camera"


def test_columns_that_tell_no_concepts(across: Path, flat: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "run")
    refuse(
        2,
        ["unknown file or column of concepts kamera", "'camera'"],
        "train",
        across,
        *ROBUST,
        "--concepts",
        "kamera",
        *out,
    )
    both = ("--concepts", "camera", "--levels", "camera,fine")
    refuse(2, ["'camera' is a level", "name another column of concepts"], "train", across, *ROBUST, *both, *out)
    wrong = (*ROBUST, "concept_level=camra", "--concepts", "camera")
    refuse(2, ["unknown level or column of concepts camra", "'camera'"], "train", across, *wrong, *out)
    pictures = sorted(flat.rglob("*.png"))
    lines = [(path, path.parent.name, "" if number % 4 == 0 else "new") for number, path in enumerate(pictures)]
    gaps = table(tmp_path / "gaps.csv", ["path", "fine", "camera"], lines)
    named = ["training rows have no concept, since their 'camera' is empty", "drop these rows"]
    refuse(3, named, "train", gaps, *ROBUST, "--concepts", "camera", *out)


def test_a_damaged_bundle_s_concepts(run: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(run / "model", tmp_path / "model")
    config = content(tmp_path / "model" / "config.json")
    rows = ({"level": "concept", "rows": wrong} for wrong in ([3], {"a": "b"}))
    columns = ({"column": True}, {"level": ["x"], "column": True}, {"level": "camera", "column": "yes"})
    for wrong in ({"level": "nope"}, {}, "concept", *columns, *rows):
        (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"concepts": wrong}))
        with pytest.raises(StorageError, match="is damaged"):
            load_bundle(tmp_path / "model")


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_accuracies_of_concepts_by_hand() -> None:
    correct = np.array([1, 1, 0, 0, 1, 1, 1, 0, 1])
    concepts = np.array([0, 0, 0, 1, 1, 2, 2, 2, -1])
    found = concept_accuracies(correct, concepts, ("big", "mid", "sun", "none"), {"big": 90, "mid": 9, "sun": 10}, 2)
    assert list(found["accuracy"].items()) == [
        ("mid", 0.5), ("big", pytest.approx(2 / 3)), ("sun", pytest.approx(2 / 3)),
    ]  # fmt: skip
    assert found["n"] == {"mid": 2, "big": 3, "sun": 3}
    assert (found["worst"], found["spread"]) == (0.5, pytest.approx(1 / 6))
    assert found["mean"] == pytest.approx((0.5 + 4 / 3) / 3) and found["smallest"] == pytest.approx((0.5 + 2 / 3) / 2)
    # Without training counts, the rows given say which are small.
    assert concept_accuracies(correct, concepts, ("big", "mid", "sun"), smallest=1)["smallest"] == 0.5
    nothing = concept_accuracies(np.zeros(0), np.zeros(0, dtype=int), ("a",))
    assert nothing["worst"] is None and nothing["accuracy"] == {}
    entry = {"concepts": {"level": "x", "accuracy": {"a": 0.5}, "worst": 0.5}}
    other = {"concepts": {"level": "x", "accuracy": {"a": 1.0}, "worst": 1.0}}
    assert mean_over_seeds([entry, other])["concepts"] == {"level": "x", "accuracy": {"a": 0.75}, "worst": 0.75}
    with pytest.raises(UsageError, match="of 1 concepts"):
        concept_accuracies(correct, concepts, ("one",))


def test_accuracy_by_step(run: Path, flat: Path) -> None:
    """Rows move along their own gradient: what is right falls, and nothing of the model is changed."""
    bundle = load_bundle(run)
    data = load_data(flat, taxonomy=bundle.model.taxonomy, image_size=12, split="all")
    runtime = Runtime.choose("cpu", "fp32")
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    bundle.model.train()
    found = accuracy_by_step(bundle.model, bundle.preprocessing, data, runtime, (0.0, 0.5, 8.0, 64.0))
    assert bundle.model.training and all(p.requires_grad for p in bundle.model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in bundle.model.state_dict().items())
    bundle.model.eval()
    inputs = bundle.preprocessing(data.images(np.arange(len(data))))
    with torch.no_grad():
        clean = bundle.model(inputs)
    assert list(found) == [0.0, 0.5, 8.0, 64.0]
    assert found[0.0] == pytest.approx(
        float((clean.logits[data.taxonomy.levels[-1]].argmax(1).numpy() == data.labels[:, -1]).mean())
    )
    # One row, by hand: x + 0.5 g / ||g||.
    outputs = moved_outputs(bundle.model, bundle.preprocessing, data, runtime, (0.0, 0.5))
    one = inputs[3:4].clone().requires_grad_()
    level = data.taxonomy.levels[-1]
    loss = torch.nn.functional.cross_entropy(bundle.model(one).logits[level], torch.from_numpy(data.labels[3:4, -1]))
    (gradient,) = torch.autograd.grad(loss, one)
    with torch.no_grad():
        expected = bundle.model(one + 0.5 * gradient / gradient.norm()).logits[level]
    torch.testing.assert_close(outputs[0.5].logits[level][3:4], expected, rtol=1e-4, atol=1e-5)
    losses = [
        torch.nn.functional.cross_entropy(o.logits[level], torch.from_numpy(data.labels[:, -1]))
        for o in outputs.values()
    ]
    assert losses[1] > losses[0]
    with pytest.raises(UsageError, match="a step must be at least 0, got -1"):
        accuracy_by_step(bundle.model, bundle.preprocessing, data, runtime, (-1.0,))


def test_a_file_that_is_no_table(tmp_path: Path) -> None:
    from nestling.data.concepts import read_pairs

    (tmp_path / "x.csv").write_bytes(b"class,share\n\xff\xfe,1\n")
    with pytest.raises(DataError, match="is not UTF-8"):
        read_pairs(tmp_path / "x.csv", "class", "share")
