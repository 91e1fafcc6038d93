"""What the commands do: own data in, a run folder out, and answers and figures in the shapes of the interface."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nestling import fit, from_pretrained, load_data
from nestling.commands import demo, pipeline, words
from nestling.errors import DataError, DivergedError, UsageError
from nestling.evaluate.predictor import Predictor
from nestling.methods import Nested, Recipe
from running import FOUR, QUICK, Done, everything, nestling, picture, pixels, refuse, succeed, table, tree

LEVEL = {"name", "accuracy", "macro_accuracy", "confidence", "overconfidence", "ece", "tree_distance", "n"}
FILES = ["metrics.json", "metrics.jsonl", "model", "recipe.toml", "report.html"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("commands")


@pytest.fixture(scope="module")
def digits(place: Path) -> Path:
    """A run on the digits: grey, 8x8, three levels."""
    succeed("train", "digits", "--out", place / "digits-run", *QUICK)
    return place / "digits-run"


@pytest.fixture(scope="module")
def colours(place: Path) -> Path:
    """A run on colour pictures of 12x12 in two levels, good enough to be sure of something; the pictures beside it."""
    source = tree(place / "colours", FOUR)
    more = ("epochs=8", "steps_per_epoch=12", "optimizer.lr=0.01", "augmentation=none")
    succeed("train", source, "--out", place / "colours-run", *QUICK, *more)
    return place / "colours-run"


def figures(run: Path) -> dict[str, Any]:
    return json.loads((run / "metrics.json").read_text(encoding="utf-8"))


# train


def check_run(run: Path, levels: list[str], done: Done | None = None) -> dict[str, Any]:
    """The files of a finished run, its figures, and that the bundle answers."""
    assert set(FILES) <= {path.name for path in run.iterdir()}
    # Groups that are never divided may leave no row for calibration.
    assert {path.name for path in (run / "model").iterdir()} - {"scores.safetensors", "rows.safetensors"} == {
        "README.md", "config.json", "model.safetensors", "taxonomy.json",
    }  # fmt: skip
    metrics = figures(run)
    for entries in (metrics["levels"], metrics["levels_uncombined"]):
        assert [entry["name"] for entry in entries] == levels
        for entry in entries:
            assert set(entry) == LEVEL
            if entry["n"]:
                assert 0 <= entry["accuracy"] <= 1 and 0 <= entry["ece"] <= 1
                assert entry["overconfidence"] == pytest.approx(entry["confidence"] - entry["accuracy"])
    assert {"agreement", "agreement_uncombined", "method", "seed", "commit", "versions", "seconds"} <= metrics.keys()
    assert all(set(found) == {"levels"} for found in metrics["distortions"].values()) and metrics["distortions"]
    for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        assert set(json.loads(line)) == {"stage", "epoch", "step", "loss", "lr", "terms"}
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "</html>" in report and "http" not in report.split("<body", 1)[0].replace("http-equiv", "")
    if done is not None:
        assert done.out.splitlines()[-1] == str(run)
    return metrics


def test_digits(digits: Path) -> None:
    metrics = check_run(digits, ["coarse", "middle", "fine"])
    assert [entry["n"] for entry in metrics["levels"]] == [450] * 3
    assert "methods" not in metrics and "verdict" not in metrics


METHODS = ("nested", "end-to-end", "flat-marginal")


@pytest.mark.parametrize("method", METHODS)
def test_a_ragged_tree(method: str, tmp_path: Path) -> None:
    source = tree(tmp_path / "source", {"red/a": 8, "red/b": 8, "blue": 8, "green/x/deep": 8, "green/y": 8})
    run = tmp_path / "run"
    done = succeed("train", source, "--method", method, "--out", run, *QUICK)
    metrics = check_run(run, ["coarse", "middle", "fine"], done)
    # A row that ends above a level does not count there.
    assert [entry["n"] for entry in metrics["levels"]] == [8, 6, 2]
    answers = json.loads(succeed("predict", run, source, "--json", "-").out)
    tree_of = {"red": {"a": {}, "b": {}}, "blue": {}, "green": {"x": {"deep": {}}, "y": {}}}
    for answer in answers:
        node = tree_of
        for name in answer["path"]:
            node = node[name]
        assert not node, f"{answer['path']} ends in the middle of the tree"
    # blue, red, green; then a, b, x, y and blue passed through; then deep and the four that end above.
    assert [p.shape for p in from_pretrained(run).predict_proba([source / "blue/0.png"]).values()] == [
        (1, 3), (1, 5), (1, 5),
    ]  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_a_single_level(method: str, tmp_path: Path) -> None:
    source = tree(tmp_path / "source", {"a": 10, "b": 10})
    done = succeed("train", source, "--method", method, "--out", tmp_path / "run", *QUICK)
    check_run(tmp_path / "run", ["level-1"], done)
    [answer] = json.loads(succeed("predict", tmp_path / "run", source / "a/0.png", "--json", "-").out)
    assert len(answer["path"]) == 1 and answer["answer"]["level"] == "level-1"


@pytest.mark.parametrize("method", METHODS)
def test_classes_that_are_hardly_there(method: str, tmp_path: Path) -> None:
    """A class with one example and a coarse class with one row train, and are warned of."""
    source = tree(tmp_path / "source", {"red/a": 1, "red/b": 10, "blue/c": 10, "green/d": 1})
    done = succeed("train", source, "--method", method, "--out", tmp_path / "run", *QUICK)
    check_run(tmp_path / "run", ["coarse", "fine"], done)
    assert "warning: level 'coarse': 1 class has one labelled training row: 'green'" in done.err
    assert "warning: level 'fine': 2 classes have one labelled training row: " in done.err


def test_a_level_of_one_class(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", {"all/a": 10, "all/b": 10})
    done = succeed("train", source, "--out", tmp_path / "run", *QUICK)
    metrics = check_run(tmp_path / "run", ["coarse", "fine"], done)
    assert "warning: level 'coarse' has one class, 'all': its answers say nothing" in done.err
    assert metrics["levels"][0]["accuracy"] == 1 and metrics["levels"][0]["confidence"] == pytest.approx(1)


def test_rows_of_a_single_class(tmp_path: Path) -> None:
    source = tree(tmp_path / "source", {"all/a": 10})
    said = "warning: all training rows are of a single class: there is nothing to tell apart"
    assert said in succeed("train", source, "--out", tmp_path / "run", *QUICK).err
    source = tree(tmp_path / "other", {"all/a": 10, "all/b": 10})
    assert said not in succeed("train", source, "--out", tmp_path / "other-run", *QUICK).err


def test_no_test_row_knows_the_finest_level(tmp_path: Path) -> None:
    source = tree(tmp_path / "pictures", FOUR)
    header, lines = lines_of()
    for number, line in enumerate(lines):
        # One of each class.
        line[2] = line[2] if number % 8 == 0 else ""
    path = table(source.parent / "few.csv", header, lines)
    done = succeed("train", path, "--method", "flat-marginal", "--out", tmp_path / "run", *QUICK)
    metrics = check_run(tmp_path / "run", ["coarse", "fine"], done)
    assert metrics["levels"][1]["n"] == 0 and metrics["levels"][1]["accuracy"] is None
    assert "in fine accuracy: no test row is labelled there" in metrics["verdict"]
    assert re.search(r"fine( +-){6} +0$", done.err, re.M)
    assert re.search(r"fine( +-){6} +0$", succeed("show", tmp_path / "run").out, re.M)


def lines_of(*more: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of the pictures of ``FOUR``; ``split`` and ``group`` may be among its columns."""
    values = {"split": ["train", "train", "validation", "test"], "group": ["g0", "g1", "g2", "g3"]}
    rows = [
        [f"pictures/{name}/{n}.png", *name.split("/"), *(values[column][n % 4] for column in more)]
        for name in FOUR
        for n in range(8)
    ]
    return ["path", "coarse", "fine", *more], rows


@pytest.mark.parametrize("more", [(), ("split",), ("group",)], ids=["plain", "split", "group"])
def test_a_table_of_ones_own(more: tuple[str, ...], tmp_path: Path) -> None:
    tree(tmp_path / "pictures", FOUR)
    source = table(tmp_path / "own.csv", *lines_of(*more))
    done = succeed("train", source, "--out", tmp_path / "run", *QUICK)
    check_run(tmp_path / "run", ["coarse", "fine"], done)
    expected = {
        (): "rows: 21 training, 3 validation, 2 calibration",
        # Where validation rows are given, the training rows are cut into training and calibration alone.
        ("split",): "rows: 14 training, 8 validation",
        ("group",): "groups kept whole",
    }
    assert expected[more] in done.err
    assert ("no test split" in done.err) == (more != ("split",))


def test_parquet_of_ones_own(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    for split, count in (("train", 12), ("test", 4)):
        columns: dict[str, list] = {"image": [], "coarse": [], "fine": []}
        for kind, name in enumerate(FOUR):
            for number in range(count):
                data = io.BytesIO()
                Image.fromarray(pixels(kind, number)).save(data, "PNG")
                columns["image"].append({"bytes": data.getvalue(), "path": None})
                columns["coarse"].append(name.split("/")[0])
                columns["fine"].append(name.split("/")[1])
        (tmp_path / "own").mkdir(exist_ok=True)
        parquet.write_table(pyarrow.table(columns), tmp_path / "own" / f"{split}.parquet")
    done = succeed("train", tmp_path / "own", "--out", tmp_path / "run", *QUICK, "--known", "fine=0.5")
    metrics = check_run(tmp_path / "run", ["coarse", "fine"], done)
    assert [entry["n"] for entry in metrics["levels"]] == [16, 16]
    assert "labels kept, of 48 rows: coarse 48, fine 24" in done.err
    config = json.loads((tmp_path / "run/model/config.json").read_text(encoding="utf-8"))
    assert config["known"] == {"fine": 0.5} and config["seed"] == 0


def test_names_told_apart_by_path(tmp_path: Path) -> None:
    """In a folder tree always, in a table where it is asked for; and evaluate understands both."""
    source = tree(tmp_path / "pictures", dict.fromkeys(["red/x", "blue/x", "blue/y"], 8))
    succeed("train", source, "--out", tmp_path / "folder", *QUICK)
    names = ("red/x", "blue/x", "blue/y")
    lines = [[f"pictures/{name}/{n}.png", *name.split("/")] for name in names for n in range(8)]
    path = table(tmp_path / "own.csv", ["path", "coarse", "fine"], lines)
    succeed("train", path, "--qualify-names", "--out", tmp_path / "table", *QUICK)
    for run in ("folder", "table"):
        assert from_pretrained(tmp_path / run).taxonomy.classes["fine"] == ("blue/x", "y", "red/x")
        assert "\ncoarse  " in succeed("evaluate", tmp_path / run).out


def test_baselines(tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = ("train", "digits", "--baselines", "--known", "fine=0.3", "--out", run, *QUICK)
    done = succeed(*arguments)
    metrics = check_run(run, ["coarse", "middle", "fine"], done)
    assert list(metrics["methods"]) == ["end-to-end", "flat-marginal", "flat-crm"]
    for comparison in metrics["comparisons"]:
        assert {"baseline", "level", "metric", "difference", "interval"} <= set(comparison)
        lo, hi = comparison["interval"]
        assert lo <= hi
    assert {c["baseline"] for c in metrics["comparisons"]} == set(metrics["methods"])
    # Every training is counted, and the precision given as chosen by the option alone.
    assert "--- training 1 of 9: nested, learning rate 0.001" in done.err
    assert "--- training 9 of 9: flat-marginal, learning rate 0.01" in done.err
    report, shown = (run / "report.html").read_text(encoding="utf-8"), succeed("show", run).out
    for line in metrics["verdict"].splitlines():
        assert line in done.err and line in shown
    for name in metrics["methods"]:
        assert name in metrics["verdict"] and name in shown and name in report
        # Each on the same grid of learning rates, chosen on its own validation rows.
    assert [f"learning rate of {name}" in shown for name in METHODS] == [True] * 3
    assert shown.count("the least validation loss (0.001: ") == 3
    # Its recipe does not pass the rate that was chosen off as one that was given.
    assert "\nlr = " not in (run / "recipe.toml").read_text(encoding="utf-8").split("[derived")[0]
    again = succeed("train", "--config", run / "recipe.toml", "--out", run)
    assert "is finished" in again.err


def test_a_precision_chosen_automatically_is_not_called_given(tmp_path: Path) -> None:
    quick = [word for word in QUICK if word not in ("--precision", "fp32")]
    done = succeed("train", "digits", "--baselines", "--out", tmp_path / "run", *quick, "optimizer.lr=0.01")
    said = {line for line in done.err.splitlines() if line.startswith("precision: ")}
    assert len(said) == 1 and "as given" not in said.pop() and "--- training 7 of 7: " in done.err


def test_baselines_choose_their_own_rate_on_the_same_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rate that is given is the method's own; a rate at which a rival diverges is left out."""
    original = pipeline.fit

    def fit(recipe: Recipe, *arguments: Any, **options: Any) -> Any:
        if recipe.method == "end-to-end" and recipe.optimizer.lr == 3e-3:
            raise DivergedError("the loss is not finite")
        return original(recipe, *arguments, **options)

    monkeypatch.setattr(pipeline, "fit", fit)
    run = tmp_path / "run"
    given = ("--set", "optimizer.lr=0.03", "skips=false")
    succeed("train", "digits", "--baselines", "--known", "fine=0.3", "--out", run, *QUICK, *given)
    shown = succeed("show", run).out
    assert "learning rate of nested: 0.03 (as given)" in shown
    assert shown.count("the least validation loss (0.001: ") == 2 and "0.003: diverged" in shown
    for method in ("end-to-end-0.01", "flat-marginal-0.01"):
        assert "skips = false" in (run / "methods" / method / "recipe.toml").read_text(encoding="utf-8")


def test_no_validation_row_is_labelled(tmp_path: Path) -> None:
    """One label of each class, which all go to training: the last epoch is kept, and nothing is compared."""
    run = tmp_path / "run"
    succeed("train", "digits", "--known", "coarse=0.0075", "--baselines", "--out", run, *QUICK)
    metrics = figures(run)
    assert metrics["validation"]["validation loss"] is None
    assert "no validation row is labelled to choose by" in succeed("show", run).out


# predict


@pytest.fixture
def pictures(colours: Path) -> list[Path]:
    return [colours.parent / "colours" / name / "0.png" for name in FOUR]


def test_answers_as_json(colours: Path, pictures: list[Path], tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(pictures[0].read_bytes()[:70])
    done = nestling("predict", colours, pictures[0], bad, pictures[2].parent, "none.png", "--json", "-")
    assert done.code == 3
    answers = json.loads(done.out)
    folder = sorted(str(path) for path in pictures[2].parent.iterdir())
    assert [answer["input"] for answer in answers] == [str(pictures[0]), str(bad), *folder, "none.png"]
    assert [set(answer) for answer in answers].count({"input", "error"}) == 2
    assert done.err.splitlines() == [f"nestling: {answers[number]['error']}" for number in (1, -1)]
    assert "bad.png" in answers[1]["error"] and answers[-1]["error"] == "none.png: there is no such file"
    for answer in answers[:1] + answers[2:-1]:
        assert set(answer) == {"input", "path", "confidence", "answer"}
        assert len(answer["path"]) == len(answer["confidence"]) == 2
        assert 1 >= answer["confidence"][0] >= answer["confidence"][1] >= 0
        assert set(answer["answer"]) == {"level", "class", "confidence"}
        sure = [i for i in (0, 1) if answer["confidence"][i] >= 0.9] or [0]
        level = {"level": ("coarse", "fine")[sure[-1]], "class": answer["path"][sure[-1]]}
        assert answer["answer"] == {**level, "confidence": answer["confidence"][sure[-1]]}
    # The net has learned something.
    assert answers[0]["path"] == ["red", "a"] and {tuple(a["path"]) for a in answers[2:-1]} == {("blue", "c")}

    done = nestling("predict", colours, pictures[0], bad, "--json", tmp_path / "new" / "answers.json")
    assert (done.code, done.out) == (3, "")
    assert json.loads((tmp_path / "new" / "answers.json").read_text(encoding="utf-8"))[0] == answers[0]
    # Without a bad one the code is 0; with nothing but bad ones 3.
    assert nestling("predict", colours, *pictures).code == 0
    assert nestling("predict", colours, bad, "--json", "-").code == 3


def test_answers_as_a_table(colours: Path, pictures: list[Path], tmp_path: Path) -> None:
    answers = json.loads(succeed("predict", colours, *pictures, "--json", "-").out)
    done = nestling("predict", colours, *pictures, "none.png", "--csv", "-", "--json", tmp_path / "answers.json")
    assert done.code == 3
    rows = list(csv.DictReader(io.StringIO(done.out)))
    assert list(rows[0]) == ["input", "answer", "level", "confidence", "path", "confidences", "error"]
    for row, answer in zip(rows, answers, strict=False):
        assert (row["input"], row["path"]) == (answer["input"], "/".join(answer["path"]))
        assert (row["answer"], row["level"]) == (answer["answer"]["class"], answer["answer"]["level"])
        assert float(row["confidence"]) == answer["answer"]["confidence"] and not row["error"]
    assert rows[-1]["error"] == "none.png: there is no such file" and not rows[-1]["path"]
    assert len(json.loads((tmp_path / "answers.json").read_text(encoding="utf-8"))) == len(pictures) + 1
    # With no file asked for, a line for each on stdout.
    lines = succeed("predict", colours, *pictures).out.splitlines()
    assert len(lines) == 4 and all(str(path) in line and " > " in line for path, line in zip(pictures, lines))
    for line, answer in zip(lines, answers, strict=True):
        assert ("unsure: below 90 %" in line) == (answer["answer"]["confidence"] < 0.9)


def test_folders_without_pictures(colours: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no picture", encoding="utf-8")
    refuse(3, [str(tmp_path), "holds no pictures"], "predict", colours, tmp_path)
    refuse(3, ["notes.txt", "is no picture that can be read"], "predict", colours, tmp_path / "notes.txt")
    refuse(3, ["aaa.png", "name"], "predict", colours, "a" * 300 + ".png")


def test_pictures_of_other_kinds(digits: Path, colours: Path, pictures: list[Path], tmp_path: Path) -> None:
    """Colour for a model of grey, grey for one of colour, other sizes, and pictures that lie on their side."""
    picture(tmp_path / "large.png", 0, 0, 40)
    Image.fromarray(np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)).save(tmp_path / "grey.png")
    Image.new("RGBA", (5, 9), (200, 10, 10, 128)).save(tmp_path / "clear.webp")
    Image.new("P", (30, 3)).save(tmp_path / "palette.gif")
    for run in (digits, colours):
        assert len(json.loads(succeed("predict", run, tmp_path, "--json", "-").out)) == 4
    upright = Image.open(pictures[0])
    turned = Image.Exif()
    turned[0x0112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "side.png", exif=turned)
    predictor = from_pretrained(colours)
    one, other = (predictor.predict_proba([path]) for path in (pictures[0], tmp_path / "side.png"))
    for level in one:
        assert np.array_equal(one[level], other[level])


# from_pretrained


@pytest.fixture(scope="module")
def predictor(colours: Path) -> Predictor:
    return from_pretrained(colours)


def test_every_kind_of_input_has_the_same_answer(predictor: Predictor, colours: Path, pictures: list[Path]) -> None:
    images = [Image.open(path).convert("RGB") for path in pictures]
    arrays = np.stack([np.asarray(image) for image in images])
    kinds = {
        "paths": pictures,
        "names": [str(path) for path in pictures],
        "a tuple": tuple(pictures),
        "PIL images": images,
        "bytes": [path.read_bytes() for path in pictures],
        "arrays": list(arrays),
        "one array": arrays,
        "a tensor": torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous(),
        "a mixture": [pictures[0], str(pictures[1]), images[2], arrays[3]],
    }
    expected = json.loads(succeed("predict", colours, *pictures, "--json", "-").out)
    bare = [{key: value for key, value in answer.items() if key != "input"} for answer in expected]
    proba, embedding = predictor.predict_proba(pictures), predictor.embed(pictures)
    for kind, inputs in kinds.items():
        answers = predictor.predict(inputs)
        assert [{key: value for key, value in answer.items() if key != "input"} for answer in answers] == bare, kind
        for level, p in predictor.predict_proba(inputs).items():
            assert np.array_equal(p, proba[level]), kind
        assert np.array_equal(predictor.embed(inputs), embedding)
    assert predictor.predict(pictures) == expected
    assert [answer["input"] for answer in predictor.predict(kinds["a mixture"])] == [
        str(pictures[0]), str(pictures[1]), "input 2", "input 3",
    ]  # fmt: skip


def test_probabilities(predictor: Predictor, pictures: list[Path], place: Path) -> None:
    predictors = [predictor, from_pretrained(place / "digits-run")] if (place / "digits-run").exists() else [predictor]
    for one in predictors:
        found = one.predict_proba(pictures)
        assert list(found) == list(one.taxonomy.levels)
        for level, p in found.items():
            assert p.dtype == np.float32 and p.shape == (4, one.taxonomy.width(level))
            assert np.allclose(p.sum(1), 1, atol=1e-5) and (p >= 0).all()
        embedding = one.embed(pictures)
        assert embedding.dtype == np.float32 and embedding.shape == (4, 8)


def test_what_is_answered_does_not_depend_on_the_batch(predictor: Predictor) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1100, 12, 12, 3), dtype=np.uint8)
    whole = predictor.predict_proba(images)["fine"]
    parts = np.concatenate([predictor.predict_proba(images[i : i + 100])["fine"] for i in range(0, 1100, 100)])
    assert np.allclose(whole, parts, atol=1e-5)


def test_nothing_to_answer(predictor: Predictor) -> None:
    for nothing in ([], (), np.zeros((0, 12, 12, 3), np.uint8), torch.zeros((0, 3, 12, 12), dtype=torch.uint8)):
        assert predictor.predict(nothing) == []
        assert {level: p.shape for level, p in predictor.predict_proba(nothing).items()} == {
            "coarse": (0, 2),
            "fine": (0, 4),
        }
        assert predictor.embed(nothing).shape == (0, 8)


GREY = Image.new("L", (8, 8))
REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a name": ("a.png", UsageError, "expected a list of inputs, got str"),
    "a path": (Path("a.png"), UsageError, "in a list"),
    "a picture": (GREY, UsageError, "in a list"),
    "bytes": (b"\x89PNG", UsageError, "in a list"),
    "None": (None, UsageError, "expected a list"),
    "a dict": ({"a.png": 1}, UsageError, "expected a list"),
    "an iterator": (iter([GREY]), UsageError, "expected a list"),
    "floats": (np.zeros((2, 8, 8)), UsageError, "uint8.*float64"),
    "booleans": (np.zeros((2, 8, 8), bool), UsageError, "uint8.*bool"),
    "one array": (np.zeros((8, 8), np.uint8), UsageError, r"\(8, 8\).*in a list"),
    "a tensor of floats": (torch.zeros(2, 3, 8, 8), UsageError, "uint8.*float32"),
    "one tensor": (torch.zeros((3, 8, 8), dtype=torch.uint8), UsageError, r"\(n, c, h, w\)"),
    "a list of floats": ([np.zeros((8, 8))], DataError, "input 0.*uint8.*float64"),
    "four channels": (np.zeros((2, 8, 8, 4), np.uint8), DataError, r"input 0.*\(8, 8, 4\)"),
    "no pixels": (np.zeros((2, 0, 0), np.uint8), DataError, r"input 0.*\(0, 0\)"),
    "numbers": ([GREY, 3], DataError, "input 1: expected a path, a PIL image or a uint8 array, got int"),
    "lists": ([[1, 2]], DataError, "input 0.*got list"),
    "texts": (["hello world"], DataError, "hello world: there is no such file"),
    "nothing among others": ([GREY, None], DataError, "input 1.*got NoneType"),
    "no picture": ([b"no picture"], DataError, "input 0: is no picture"),
    "floating-point pixels": ([Image.new("F", (8, 8))], DataError, "input 0.*8 bits"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_picture_is_refused(name: str, predictor: Predictor) -> None:
    inputs, error, message = REFUSED[name]
    for method in (predictor.predict, predictor.predict_proba, predictor.embed):
        with pytest.raises(error, match=message):
            method(inputs)


# evaluate


def test_figures_as_json(digits: Path, tmp_path: Path) -> None:
    done = succeed("evaluate", digits, "--distort", "turbulence:1,0.5", "half:top", "--json", "-")
    found, kept = json.loads(done.out), figures(digits)
    assert found["levels"] == kept["levels"] and found["levels_uncombined"] == kept["levels_uncombined"]
    assert list(found["distortions"]) == ["turbulence:1,0.5", "half:top"]
    assert found["distortions"]["turbulence:1,0.5"] == kept["distortions"]["turbulence:1,0.5"]
    assert {"agreement", "agreement_uncombined", "method", "seed", "commit", "versions", "seconds"} <= found.keys()
    assert not done.err
    done = succeed("evaluate", digits, "--json", tmp_path / "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))["levels"] == kept["levels"]
    assert "nested on digits, test: 450 rows" in done.out
    header, *rows = succeed("evaluate", digits, "--distort", "half:top").out.splitlines()[1:]
    rows = [row for row in rows if not row.startswith("hierarchical")]
    titles = ["level", "accuracy %", "by class %", "confidence %", "overconfidence"]
    titles += ["calibration error %", "tree distance", "rows"]
    assert re.split(r"  +", header.strip()) == titles and len({len(row) for row in (header, *rows)}) == 1
    assert [row.split()[0] for row in rows] == ["clean", "middle", "fine", "half:top", "middle", "fine"]
    coarse = kept["levels"][0]
    assert rows[0].split()[2] == f"{100 * coarse['accuracy']:.1f}" and f"{coarse['tree_distance']:.2f}" in rows[0]
    assert json.loads(succeed("evaluate", digits / "model", "--json", "-").out)["levels"] == kept["levels"]


def test_other_rows(digits: Path, colours: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = succeed("evaluate", digits, "--split", "train")
    assert "train: 1347 rows" in done.out and "warning: the model was trained on rows of split train" in done.err
    assert "all: 32 rows" in succeed("evaluate", colours, "--split", "all").out
    refuse(2, ["unknown split", "nope", "'train', 'test'"], "evaluate", digits, "--split", "nope")
    lines = [["a.png", "red", "a"], ["b.png", "blue", ""], ["c.png", "blue", "d"]]
    for number, (name, *_) in enumerate(lines):
        picture(tmp_path / name, number, 0, 20)
    own = table(tmp_path / "own.csv", ["path", "coarse", "fine"], lines)
    found = json.loads(succeed("evaluate", colours, "--source", own, "--split", "all", "--json", "-").out)
    assert [entry["n"] for entry in found["levels"]] == [3, 2]
    # Of rows that another wrote, a part is evaluated only where that is said.
    refuse(3, ["too few to cut a test split", "'all'"], "evaluate", colours, "--source", own)
    other = tree(tmp_path / "other", FOUR)
    done = succeed("evaluate", colours, "--source", other)
    assert "test: 6 of 32 rows, because the source has no test split" in done.err
    assert "--split all evaluates every row" in done.err and "warning" not in done.err
    # Columns of other names are taken in the order of the levels, which is said; one alone by its names.
    table(own, ["path", "kind", "sort"], lines)
    done = succeed("evaluate", colours, "--source", own, "--split", "all")
    assert "all: 3 rows" in done.out
    assert done.err == "columns taken as levels by their position: 'kind' as 'coarse', 'sort' as 'fine'\n"
    # A column that the model has no level for is not read, which is said.
    table(own, ["path", "coarse", "sort"], lines)
    done = succeed("evaluate", colours, "--source", own, "--split", "all")
    assert done.err == "not read, for no level of the taxonomy is called so: 'sort'\n"
    table(own, ["path", "label"], [line[:2] for line in lines])
    found = json.loads(succeed("evaluate", colours, "--source", own, "--split", "all", "--json", "-").out)
    assert [entry["n"] for entry in found["levels"]] == [3, 0]
    monkeypatch.chdir(tmp_path)
    shutil.copytree(colours / "model", "model")
    config = json.loads(Path("model/config.json").read_text(encoding="utf-8"))
    Path("model/config.json").write_text(json.dumps(config | {"source": "gone"}), encoding="utf-8")
    refuse(2, ["unknown source gone", "was trained on 'gone'", "--source"], "evaluate", "model")
    del config["source"]
    Path("model/config.json").write_text(json.dumps(config), encoding="utf-8")
    refuse(2, ["does not say what it was trained on", "--source"], "evaluate", "model")


def test_rows_that_do_not_fit(digits: Path, colours: Path, tmp_path: Path) -> None:
    refuse(3, ["unknown class", "'coarse'", "blue"], "evaluate", digits, "--source", colours.parent / "colours")
    picture(tmp_path / "a.png")
    own = table(tmp_path / "own.csv", ["path", "coarse", "fine"], [["a.png", "red", "z"]] * 3)
    refuse(3, ["unknown class", "'fine'", "z"], "evaluate", colours, "--source", own, "--split", "all")
    table(own, ["path", "coarse", "fine"], [["a.png", "red", "c"]] * 3)
    refuse(3, ["rows 0, 1, 2", "'c'", "'blue'"], "evaluate", colours, "--source", own, "--split", "all")
    table(own, ["path", "coarse", "fine"], [["a.png", "", ""]] * 3)
    refuse(3, ["is labelled", "nothing to score"], "evaluate", colours, "--source", own, "--split", "all")
    texts = table(tmp_path / "texts.csv", ["text", "coarse", "fine"], [["words", "red", "a"]] * 3)
    refuse(2, ["texts", "images"], "evaluate", colours, "--source", texts, "--split", "all")


def test_impossible_distortions(digits: Path, tmp_path: Path) -> None:
    refuse(2, ["smoothness", "[0, 8] pixels", "8 x 8", "30"], "evaluate", digits, "--distort", "turbulence:30,1")
    refuse(2, ["8 x 8", "99"], "evaluate", digits, "--distort", "half:top", "blur:99")
    refuse(2, ["half:left"], "evaluate", digits, "--distort", "half:left")
    refuse(5, ["cannot write"], "evaluate", digits, "--json", digits / "metrics.json" / "x.json")


# show


def test_show(digits: Path, tmp_path: Path) -> None:
    shown = succeed("show", digits).out
    for part in ('source = "digits"', "epochs = 1", "precision: fp32 (as given)", "backbone: conv:4/8 (as given)"):
        assert part in shown
    accuracy = figures(digits)["levels"][2]["accuracy"]
    assert f"fine    {100 * accuracy:>10.1f}  " in shown and "  450\n" in shown and str(digits / "report.html") in shown
    assert "\n  patience = " in shown and "\n  optimizer.patience = " in shown and "\n  optimizer.lr = 0.003\n" in shown
    card = succeed("show", digits / "model").out
    assert card == (digits / "model" / "README.md").read_text(encoding="utf-8") + "\n"
    run = Path(shutil.copytree(digits, tmp_path / "run"))
    (run / "report.html").unlink()
    assert "not finished: the same training command goes on" in succeed("show", run).out
    shutil.copy(digits / "report.html", run)
    for content in ("", "[]", "{}", '{"method": "nested", "levels": 3}', "\xff"):
        (run / "metrics.json").write_text(content, encoding="latin-1")
        refuse(5, [str(run), "damaged"], "show", run)
    for content in ("a = = 3", "", "given = 3", "[given]\n[derived]\nx = 3", "\xff"):
        (run / "recipe.toml").write_text(content, encoding="latin-1")
        refuse(5, [str(run)], "show", run)


def test_a_training_in_python(colours: Path, tmp_path: Path) -> None:
    """Its folder is shown; what is missing is the model, which the run saves beside the rest."""
    folder = tmp_path / "run"
    data = load_data(colours.parent / "colours")
    recipe = Nested(epochs=1, steps_per_epoch=2, batch_size=16)
    run = fit(recipe, data, out=folder, backbone="conv:4/8", device="cpu", verbose=False)
    shown = succeed("show", folder).out
    assert "stages finished: coarse, fine, temperature; no model is saved" in shown
    again = f"run.save_pretrained('{folder / 'model'}')"
    for command in (("predict", folder, colours.parent / "colours"), ("evaluate", folder)):
        refuse(2, ["trained by nestling.fit", "the same call of fit", again], *command)
    run.save_pretrained(folder / "model")
    assert f"model: {folder / 'model'}" in succeed("show", folder).out
    assert len(succeed("predict", folder, colours.parent / "colours").out.splitlines()) == 32


def test_the_program_is_named_as_it_can_be_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "bin" / "nestling"
    script.parent.mkdir()
    script.write_text("", encoding="utf-8")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", "/nowhere")
    for called, said in (
        (str(script), str(script)),
        ("-c", "nestling"),
        (str(tmp_path / "__main__.py"), f"{sys.executable} -m nestling"),
    ):
        monkeypatch.setattr(sys, "argv", [called])
        assert words.program() == said
    monkeypatch.setenv("PATH", str(script.parent))
    monkeypatch.setattr(sys, "argv", [str(script)])
    assert words.program() == "nestling"


def test_show_imports_no_torch(digits: Path) -> None:
    script = "import sys; from nestling.cli import run; run(['show', sys.argv[1]]); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script, str(digits)], check=True, capture_output=True, timeout=60)


# demo


@pytest.fixture
def short_demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The demo in this process and in a few steps; the names of the trainings that it asked for."""
    chosen = {name: replace(recipe, epochs=1, steps_per_epoch=3) for name, recipe in demo.recipes().items()}
    asked: list[str] = []

    def run_jobs(jobs: list) -> None:
        for job in jobs:
            asked.append(job.name)
            job.function(*job.arguments)

    monkeypatch.setattr(demo, "recipes", lambda: chosen)
    monkeypatch.setattr("nestling.commands.jobs.run_jobs", run_jobs)
    return asked


def check_demo(run: Path, seeds: int) -> dict[str, Any]:
    """The files and figures of a demo."""
    assert set(FILES) <= {path.name for path in run.iterdir()}
    metrics = figures(run)
    assert set(metrics["methods"]) >= {"end-to-end", "flat-marginal", "flat-crm"}
    for entry in (metrics, *metrics["methods"].values()):
        assert [level["name"] for level in entry["levels"]] == ["coarse", "middle", "fine"]
        assert set(entry["distortions"]) == {"turbulence:1,0.25", "turbulence:1,0.5"}
        for level in entry["levels"]:
            assert level["n"] == 450 and set(level) == LEVEL | ({"std"} if seeds > 1 else set())
            if seeds > 1:
                assert set(level["std"]) == LEVEL - {"name", "n"}
    if seeds > 1:
        assert [seed["seed"] for seed in metrics["seeds"]] == list(range(seeds))
        fine = [seed["nested"]["levels"][-1]["accuracy"] for seed in metrics["seeds"]]
        assert metrics["levels"][-1]["accuracy"] == pytest.approx(np.mean(fine))
        assert metrics["levels"][-1]["std"]["accuracy"] == pytest.approx(np.std(fine, ddof=1))
    for comparison in metrics["comparisons"]:
        assert {"baseline", "level", "metric", "difference", "interval"} <= set(comparison)
    for name in ("end-to-end", "flat-marginal", "flat-crm"):
        assert name in metrics["verdict"]
    report = (run / "report.html").read_text(encoding="utf-8")
    assert "</html>" in report and f"{100 * metrics['levels'][-1]['accuracy']:.1f}" in report
    assert sorted(path.name for path in (run / "examples").iterdir()) == [f"digit-{n}.png" for n in range(10)]
    answers = json.loads(succeed("predict", run / "model", run / "examples" / "digit-3.png", "--json", "-").out)
    assert answers == from_pretrained(run).predict([str(run / "examples" / "digit-3.png")])
    assert [len(answer["path"]) for answer in answers] == [3]
    return metrics


def test_a_short_demo(short_demo: list[str], tmp_path: Path) -> None:
    run = tmp_path / "demo"
    done = succeed("demo", "--out", run, "--seeds", 2)
    assert len(short_demo) == 6
    check_demo(run, 2)
    assert f"nestling predict {run / 'model'} {run / 'examples'}" in done.out
    for line in figures(run)["verdict"].splitlines():
        assert line in done.err
    # Once more it says that it is finished; with other seeds it is another demo.
    before = everything(run)
    assert "is finished" in succeed("demo", "--out", run, "--seeds", 2).err and len(short_demo) == 6
    refuse(2, ["seeds: 2 there, 3 now", "--out"], "demo", "--out", run)
    assert everything(run) == before
    # A training can be repeated from what the demo was given.
    short = ("--set", "epochs=1", "steps_per_epoch=1")
    succeed("train", "--config", run / "recipe.toml", "--out", tmp_path / "again", *short)


@pytest.mark.long
def test_the_demo(tmp_path: Path, record_property: Any) -> None:
    """As a user runs it. Which method wins is reported, not asserted."""
    began = time.monotonic()
    command = [sys.executable, "-m", "nestling", "demo", "--out", str(tmp_path / "demo")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1200)
    assert done.returncode == 0, done.stderr
    record_property("demo_seconds", round(time.monotonic() - began, 1))
    metrics = check_demo(tmp_path / "demo", 3)
    fine = {name: entry["levels"][-1] for name, entry in {"nested": metrics, **metrics["methods"]}.items()}
    record_property("fine_accuracy", {name: round(level["accuracy"], 4) for name, level in fine.items()})
    record_property("verdict", metrics["verdict"])
    assert fine["nested"]["accuracy"] >= 0.94
