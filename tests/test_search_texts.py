"""``nestling index`` and ``nestling search`` of texts: by a file, by a row, and by the words themselves."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import numpy as np
import pytest

from nestling import load_data
from nestling.data.dataset import LabelledData
from nestling.evaluate.index import Index
from nestling.methods import Coins
from nestling.taxonomy import Taxonomy
from running import QUICK, nestling, picture, refuse, succeed

TOPICS = {
    "animal": ("dog bark tail", "cat purr whisker", "cow milk udder", "horse ride saddle"),
    "plant": ("tree leaf twig", "rose petal thorn", "fern spore shade", "moss damp stone"),
}
FEW = ("--backbone", "text:6/8", "--set", "epochs=2", "steps_per_epoch=4", "batch_size=32")
OTHERS = "the of and in on with some very old new big small good bad time day".split()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of texts that knows animals from plants, and of each topic 24 texts that share words."""
    folder, drawn = tmp_path_factory.mktemp("texts"), random.Random(0)
    with (folder / "source.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "coarse"])
        for coarse, topics in TOPICS.items():
            for topic in topics:
                for _ in range(24):
                    words = topic.split() + drawn.choices(OTHERS, k=5)
                    table.writerow([" ".join(drawn.sample(words, len(words))), coarse])
    succeed("train", folder / "source.csv", "--method", "coins", *FEW, "--out", folder / "run")
    (folder / "letters" / "inner").mkdir(parents=True)
    (folder / "letters" / "one.txt").write_text("a cow, its milk & its <udder>")
    (folder / "letters" / "inner" / "two.txt").write_text("on stone there is moss, and it is damp")
    return folder


def test_search_from_coarse_labels_names_what_is_better_of_texts() -> None:
    data = load_data("digits").keep({"middle": 0.0})
    tree = Taxonomy.from_paths(["animal/dog", "plant/tree"], ["coarse", "fine"])
    texts = LabelledData(["a dog", "a tree"], np.array([[0, -1], [1, -1]]), tree)
    assert not Coins().remarks(data) and "--method nested --levels coarse" in Coins().remarks(texts)[0]


def found(out: str) -> list[list[str]]:
    """The texts of the hits, by query."""
    return [[hit["text"] for hit in result["hits"]] for result in json.loads(out)]


def test_texts_are_found_by_their_words(place: Path) -> None:
    """The topic has no label: what tells it are the words."""
    queries = ("my old dog with a tail and a bark", place / "letters" / "one.txt", "source.csv row 0")
    done = succeed("search", place / "run", *queries, "--gallery", place / "source.csv", "-k", 5, "--json", "-")
    dogs, cows, beside = found(done.out)
    assert all("dog" in text for text in dogs + beside) and all("milk" in text for text in cows)
    first, _, row = json.loads(done.out)
    assert first["query"] == queries[0] and first["hits"][0]["labels"] == {"coarse": "animal"}
    assert "source.csv row 0" not in {hit["item"] for hit in row["hits"]} and len(row["hits"]) == 5


def test_an_index_holds_how_texts_begin(place: Path, tmp_path: Path) -> None:
    succeed("index", place / "run", place / "letters", "--out", tmp_path / "index")
    made = Index.read(tmp_path / "index")
    assert made.texts == ("on stone there is moss, and it is damp", "a cow, its milk & its <udder>")
    page = tmp_path / "page.html"
    done = succeed("search", place / "run", "moss on a stone", "--gallery", tmp_path / "index", "--html", page)
    lines = done.out.splitlines()
    assert lines[0] == "moss on a stone" and lines[1].endswith("two.txt  on stone there is moss, and it is damp")
    text = page.read_text()
    assert "<blockquote>a cow, its milk &amp; its &lt;udder&gt;</blockquote>" in text and "<udder>" not in text
    assert text.count("<blockquote>") == 3


def test_what_is_no_query_is_said(place: Path, tmp_path: Path) -> None:
    """The other queries are answered, however long a text is."""
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").mkdir()
    (tmp_path / "blank.txt").write_text(" ")
    missing = ("doggy", "", "a letter.txt", tmp_path / "a letter", "source.csv row 9999")
    wrong = (
        *missing,
        tmp_path / "binary.txt",
        tmp_path / "empty",
        place / "source.csv",
        "qqq zzz",
        tmp_path / "blank.txt",
    )
    done = nestling("search", place / "run", *wrong, "a dog barks " * 1000, "--gallery", place / "source.csv")
    errors = done.err.splitlines()
    assert done.code == 3 and len(errors) == len(wrong)
    assert all("neither a file, nor the name of a row" in line for line in errors[: len(missing)])
    said = ("save it as that", "holds no texts", "a table, not a text", "none of its words", "none of its words")
    assert all(part in line for part, line in zip(said, errors[len(missing) :], strict=True))
    assert done.out.startswith("a dog barks") and len(done.out.splitlines()) == 11


@pytest.mark.parametrize("option", ["--json", "--html"])
def test_nothing_of_others_is_written_over(place: Path, tmp_path: Path, option: str) -> None:
    mine = tmp_path / "mine.csv"
    mine.write_text("text,coarse\n")
    asked = ("search", place / "run", "a dog", "--gallery", place / "source.csv", option)
    refuse(2, ["mine.csv is there and holds no answers", "another name"], *asked, mine)
    refuse(2, ["holds no answers"], "evaluate", place / "run", "--errors", option, mine)
    refuse(2, ["holds no answers"], "lint", place / "source.csv", "--json", mine)
    assert mine.read_text() == "text,coarse\n"
    for _ in range(2):
        succeed(*asked, tmp_path / "found")


def test_a_slash_is_no_folder(place: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = succeed("search", place / "run", "dog and/or tail", "--gallery", place / "source.csv", "--html", page)
    assert done.out.startswith("dog and/or tail") and page.read_text().count("dog and/or tail") == 1


def test_a_folder_of_texts_with_a_bad_one(place: Path, tmp_path: Path) -> None:
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "good.txt").write_text("a dog \x1b[31m with\n a tail")
    (folder / "torn.txt").write_bytes(b"\xff\xfe\x00")
    refuse(3, ["torn.txt", "UTF-8"], "index", place / "run", folder, "--out", tmp_path / "index")
    done = succeed("index", place / "run", folder, "--on-bad-image", "skip", "--out", tmp_path / "index")
    assert "texts that cannot be read and are left out (1): " in done.err
    assert Index.read(tmp_path / "index").texts == ("a dog [31m with a tail",)


@pytest.mark.parametrize("texts", ['"xx"', '["only one"]', '["\\ud800 x", "b"]', "[1, 2]"])
def test_a_damaged_index_of_texts(place: Path, tmp_path: Path, texts: str) -> None:
    succeed("index", place / "run", place / "letters", "--out", tmp_path / "index")
    rows = tmp_path / "index" / "index.json"
    rows.write_text(json.dumps(json.loads(rows.read_text()) | {"texts": 0}).replace('"texts": 0', f'"texts": {texts}'))
    refuse(5, ["is damaged", "index again"], "search", place / "run", "a dog", "--gallery", tmp_path / "index")


def test_pictures_and_texts_are_not_compared(place: Path, tmp_path: Path) -> None:
    for number in range(8):
        picture(tmp_path / "pictures" / "ab"[number % 2] / f"{number}.png", number % 2, number, size=8)
    asked = ("search", place / "run", "a dog", "--gallery")
    refuse(3, ["holds no texts"], *asked, tmp_path / "pictures")
    refuse(2, ["digits holds pictures, and this model compares texts"], *asked, "digits")
    succeed("train", "digits", "--method", "coins", *QUICK, "--out", tmp_path / "run")
    refuse(2, ["texts", "compares pictures"], "index", tmp_path / "run", place / "source.csv")
