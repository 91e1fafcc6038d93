"""``nestling index`` and ``nestling search``: what they write and answer, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load, save

from nestling import from_pretrained
from nestling.bundle import save_bundle
from nestling.commands.index import is_flat
from nestling.data.sources import load_data
from nestling.data.transforms import Preprocessing
from nestling.errors import UsageError
from nestling.evaluate.index import Index, is_index
from nestling.evaluate.retrieval import normalised
from nestling.models.build import build_model
from running import QUICK, nestling, refuse, succeed


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and a gallery of 30 pictures in class folders."""
    folder = tmp_path_factory.mktemp("search")
    for seed in (0, 1):
        succeed("train", "digits", "--method", "coins", *QUICK, "--seed", seed, "--out", folder / f"model-{seed}")
    generator = np.random.default_rng(0)
    for number in range(30):
        picture = folder / "gallery" / "ab"[number % 2] / f"{number % 2}-{number % 5}" / f"{number:02d}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (8, 8), dtype=np.uint8)).save(picture)
    return folder


@pytest.fixture
def index(place: Path, tmp_path: Path) -> Path:
    out = tmp_path / "index"
    assert succeed("index", place / "model-0", place / "gallery", "--out", out).out == f"{out}\n"
    return out


def test_a_run_tells_what_search_and_theory_find(place: Path) -> None:
    """In metrics.json, in the report, and in the model card; the rows that trained are those that are looked at."""
    run = place / "model-0"
    metrics = json.loads((run / "metrics.json").read_text())
    report, card = (run / "report.html").read_text(), (run / "model" / "README.md").read_text()
    theory, recalls = metrics["theory"], metrics["retrieval"]
    assert theory["fine"]["violations"] == 0 and 0 < theory["alpha"]["least"] <= theory["alpha within"]["least"] <= 1
    trained = int((run / "recipe.toml").read_text().split(" training, ")[0].rpartition('"')[2])
    assert theory["rows"] == trained < 2000
    assert f"On {trained:,} training rows" in report and 'id="retrieval"' in report
    assert f"| fine | {100 * recalls['fine']['1']:.1f} |" in card


def test_only_an_index_is_replaced(place: Path, index: Path, tmp_path: Path) -> None:
    """A folder of pictures, and an index with something beside it, stay as they are; nothing is embedded before."""
    pictures, file, beside = tmp_path / "pictures", tmp_path / "notes.txt", tmp_path / "beside"
    shutil.copytree(place / "gallery", pictures)
    file.write_text("mine")
    shutil.copytree(index, beside)
    (beside / "mine.txt").write_text("mine")
    for out in (pictures, file, beside):
        before = sorted(tmp_path.rglob("*"))
        # The source is not even looked at.
        message = [str(out), "is no index", "--out"]
        refuse(2, message, "index", place / "model-0", tmp_path / "nowhere", "--out", out)
        assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UsageError, match="is no index"):
        Index.read(index).write(pictures)
    empty = tmp_path / "empty"
    empty.mkdir()
    for out in (empty, index, tmp_path / "new"):
        succeed("index", place / "model-0", place / "gallery", "--out", out)
        assert is_index(out)


DEEP = "lists in lists"


def answers(*arguments: object) -> list[dict]:
    return json.loads(succeed("search", *arguments, "--json", "-").out)


def test_an_index_answers_as_its_source_does(place: Path, index: Path, tmp_path: Path) -> None:
    model, query = place / "model-0", place / "gallery" / "a" / "0-2" / "02.png"
    found = answers(model, query, "--gallery", index, "-k", "4")
    assert found == answers(model, query, "--gallery", place / "gallery", "-k", 4)
    (one,) = found
    assert one["query"] == str(query) and len(one["hits"]) == 4
    assert one["hits"][0] == {"item": str(query), "score": pytest.approx(1), "labels": {"coarse": "a", "fine": "0-2"}}
    scores = [hit["score"] for hit in one["hits"]]
    assert scores == sorted(scores, reverse=True)
    # By the features themselves.
    pictures = sorted((place / "gallery").rglob("*.png"))
    features = from_pretrained(model).embed(pictures)
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    expected = features @ features[pictures.index(query)]
    assert [hit["item"] for hit in one["hits"]] == [str(pictures[row]) for row in np.argsort(-expected)[:4]]
    assert scores == pytest.approx(np.sort(expected)[::-1][:4].tolist(), abs=1e-5)


def test_a_rebuilt_index_is_the_same(place: Path, index: Path, tmp_path: Path) -> None:
    succeed("index", place / "model-0", place / "gallery", "--out", tmp_path / "again")
    assert {p.name for p in index.iterdir()} == {"features.safetensors", "index.json"} and is_index(index)
    for name in ("features.safetensors", "index.json"):
        assert (tmp_path / "again" / name).read_bytes() == (index / name).read_bytes()


def test_rows_of_sets_are_asked_for_by_name(place: Path, tmp_path: Path) -> None:
    succeed("index", place / "model-0", "digits", "--out", tmp_path / "digits")
    page = tmp_path / "page.html"
    done = succeed("search", place / "model-0", "digits row 17", "--gallery", tmp_path / "digits", "--html", page)
    lines = done.out.splitlines()
    assert lines[0] == "digits row 17" and len(lines) == 11
    assert not any("digits row 17 " in line for line in lines[1:]), "a row is not its own answer"
    assert page.read_text().count("data:image/png") == 11


def test_the_page_marks_right_and_wrong(place: Path, index: Path, tmp_path: Path) -> None:
    page, query = tmp_path / "page.html", place / "gallery" / "b" / "1-1" / "01.png"
    copy = tmp_path / "<i>copy.png"
    shutil.copy(query, copy)
    succeed("search", place / "model-0", query, copy, "--gallery", index, "-k", "30", "--html", page)
    text = page.read_text()
    # Of the query's three pictures of one class all are found; nothing is known of the copy.
    assert text.count('class="right"') == 3 and text.count('class="wrong"') == 27
    assert text.count("data:image/png") == 62 and "<i>copy" not in text and "&lt;i&gt;copy" in text
    assert text.count(".png</span></figcaption>") == 61, "names stand below classes, where these are known"


def test_a_folder_without_classes_is_a_gallery(place: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for picture in (place / "gallery").rglob("*.png"):
        shutil.copy(picture, flat / picture.name)
    ((first, *_),) = [one["hits"] for one in answers(place / "model-0", flat / "07.png", "--gallery", flat)]
    assert first == {"item": str(flat / "07.png"), "score": pytest.approx(1), "labels": {}}


def test_files_that_vanished_are_reported_and_the_rest_is_answered(place: Path, tmp_path: Path) -> None:
    gallery, query = tmp_path / "gallery", place / "gallery" / "a" / "0-0" / "00.png"
    shutil.copytree(place / "gallery", gallery)
    succeed("index", place / "model-0", gallery, "--out", tmp_path / "index")
    before = answers(place / "model-0", query, "--gallery", tmp_path / "index", "-k", 5)[0]["hits"]
    Path(before[0]["item"]).unlink()
    Path(before[2]["item"]).unlink()
    done = succeed("search", place / "model-0", query, "--gallery", tmp_path / "index", "-k", 3, "--json", "-")
    assert json.loads(done.out)[0]["hits"] == [before[1], before[3], before[4]]
    assert "2 files of the index are gone" in done.err and Path(before[0]["item"]).name in done.err


def test_a_gallery_that_moved_as_a_whole_is_no_success(place: Path, tmp_path: Path) -> None:
    gallery = tmp_path / "gallery"
    shutil.copytree(place / "gallery", gallery)
    succeed("index", place / "model-0", gallery, "--out", tmp_path / "index")
    gallery.rename(tmp_path / "moved")
    query = place / "gallery" / "a" / "0-0" / "00.png"
    done = nestling("search", place / "model-0", query, "--gallery", tmp_path / "index")
    assert done.code == 3 and "files of the index are gone" in done.err and "index again" in done.err


def test_a_query_that_is_neither_file_nor_row_says_what_rows_are_called(place: Path, index: Path) -> None:
    done = nestling("search", place / "model-0", "row 3", "--gallery", index)
    assert done.code == 3
    assert "row 3: neither a file, nor the name of a row of the gallery (rows have names such as '" in done.err


def test_a_query_that_is_no_picture_is_reported(place: Path, index: Path, tmp_path: Path) -> None:
    bad, good = tmp_path / "bad.png", place / "gallery" / "a" / "0-0" / "00.png"
    bad.write_text("no picture")
    done = nestling("search", place / "model-0", bad, good, tmp_path / "none.png", "--gallery", index, "--json", "-")
    found = json.loads(done.out)
    assert done.code == 3
    assert [list(one) for one in found] == [["query", "error"], ["query", "hits"], ["query", "error"]]
    assert "bad.png" in found[0]["error"] and len(found[1]["hits"]) == 10


def test_what_search_refuses(place: Path, index: Path, tmp_path: Path) -> None:
    query = place / "gallery" / "a" / "0-0" / "00.png"
    asked = ("search", place / "model-0", query, "--gallery")
    refuse(
        2, ["made by another model", "index the source again"], "search", place / "model-1", query, "--gallery", index
    )
    refuse(2, ["no source", "nowhere"], *asked, tmp_path / "nowhere")
    refuse(2, ["-k must be at least 1, got 0"], *asked, index, "-k", "0")
    refuse(2, ["there is no run"], "search", tmp_path / "none", query, "--gallery", index)
    refuse(2, ["there is no run"], "index", tmp_path / "none", place / "gallery")
    (tmp_path / "empty").mkdir()
    refuse(3, ["holds no pictures"], "index", place / "model-0", tmp_path / "empty")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows | {"items": rows["items"][:-1]}, "features, items and labels of"),
        (lambda rows: rows | {"items": [1] * 30}, "features, items and labels of"),
        (lambda rows: {"format": 1}, "KeyError"),
        (lambda rows: rows | {"format": 2}, "newer nestling"),
        (lambda rows: [], "TypeError"),
        (lambda rows: rows | {"items": DEEP}, "RecursionError"),
    ],
)
def test_a_damaged_index_is_refused(place: Path, index: Path, change, message: str) -> None:
    rows = json.loads((index / "index.json").read_text())
    (index / "index.json").write_text(json.dumps(change(rows)).replace(f'"{DEEP}"', "[" * 10**5 + "]" * 10**5))
    query = place / "gallery" / "a" / "0-0" / "00.png"
    refuse(5, [message, "index again"], "search", place / "model-0", query, "--gallery", index)


def test_torn_features_are_refused(place: Path, index: Path) -> None:
    features = index / "features.safetensors"
    features.write_bytes(features.read_bytes()[:-8])
    query = place / "gallery" / "a" / "0-0" / "00.png"
    refuse(5, ["is damaged", "index again"], "search", place / "model-0", query, "--gallery", index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda features: features * 2, "not of unit norm"),
        (lambda features: features * torch.linspace(0.5, 1, 30)[:, None], "not of unit norm"),
        (lambda features: features * torch.nan, "not finite numbers"),
        (lambda features: torch.eye(30), "features of width 30, this model's have 8"),
    ],
)
def test_features_that_the_model_cannot_have_made_are_refused(place: Path, index: Path, change, message: str) -> None:
    file = index / "features.safetensors"
    file.write_bytes(save({"features": change(load(file.read_bytes())["features"])}))
    query = place / "gallery" / "a" / "0-0" / "00.png"
    refuse(5, [message, "index again"], "search", place / "model-0", query, "--gallery", index)


def test_a_name_of_the_catalogue_is_no_folder(
    place: Path, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``digits`` is the set, whatever lies here; ``./digits`` is the folder, be it of pictures or an index."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place / "gallery" / "a" / "0-0", "digits")
    assert [is_flat(source) for source in ("digits", "./digits", "hf:owner/name")] == [False, True, False]
    shutil.rmtree("digits")
    shutil.copytree(index, "digits")
    query = place / "gallery" / "a" / "0-0" / "00.png"
    for gallery, item in (("digits", "digits row"), ("./digits", ".png")):
        ((hit,),) = [one["hits"] for one in answers(place / "model-0", query, "--gallery", gallery, "-k", 1)]
        assert item in hit["item"]


def test_files_are_asked_for_once_and_no_more_than_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against sorting the whole gallery: whatever is gone, and with many rows of equal score."""
    generator = torch.Generator().manual_seed(0)
    features = normalised(torch.randn(300, 4, generator=generator).round())
    index = Index(features, tuple(f"{row}.png" for row in range(300)), {}, "", "gallery", root=str(tmp_path))
    queries = torch.randn(5, 4, generator=generator).round()
    asked: list[int] = []
    for share in (0.0, 0.5, 0.97, 1.0):
        lost = set((torch.rand(300, generator=generator) < share).nonzero()[:, 0].tolist())
        asked.clear()
        monkeypatch.setattr(Index, "is_gone", lambda self, row, lost=lost: asked.append(row) or row in lost)
        hits, gone = index.search(queries, 7)
        expected, named = [], set()
        for unit in normalised(queries):
            (scores,) = unit[None] @ features.T
            order = sorted(range(300), key=lambda row: (-scores[row].item(), row))
            there = [row for row in order if row not in lost][:7]
            expected.append(there)
            named |= lost & set(order[: order.index(there[-1])] if len(there) == 7 else order)
        assert [[row for row, _ in found] for found in hits] == expected
        assert sorted(gone) == sorted(f"{row}.png" for row in named)
        assert len(asked) == len(set(asked)) == len(named | {row for found in expected for row in found})


def test_an_index_goes_through_its_folder(index: Path, tmp_path: Path) -> None:
    read = Index.read(index)
    read.write(tmp_path / "copy")
    again = Index.read(tmp_path / "copy")
    assert again.items == read.items and again.labels == read.labels and again.features.equal(read.features)


def test_an_index_of_a_made_set_is_of_the_runs_own_rows(tmp_path: Path) -> None:
    """``digit-pairs`` of seed 3 for the run of seed 3: what it was trained on, and what it was tested on."""
    run, out = tmp_path / "run", tmp_path / "index"
    train = load_data("digit-pairs", seed=3)
    model = build_model(train.taxonomy, train.image_shape, "conv:4/8", "coins")
    preprocessing = Preprocessing(*train.image_shape, mean=(0.5,), std=(0.25,))
    save_bundle(run, model, preprocessing, source="digit-pairs", seed=3)
    succeed("index", run, "digit-pairs", "--device", "cpu", "--out", out)
    found = Index.read(out)
    for seed in (3, 0):
        data = load_data("digit-pairs", "all", seed=seed)
        names = [data.taxonomy.classes["fine"][code] for code in data.labels[:, 1]]
        assert (found.labels["fine"] == names) == (seed == 3)
    rows = np.arange(0, len(data), 400)
    features = from_pretrained(run).embed(load_data("digit-pairs", "all", seed=3).images(rows))
    torch.testing.assert_close(found.features[rows], normalised(torch.from_numpy(features)), rtol=0, atol=1e-5)
