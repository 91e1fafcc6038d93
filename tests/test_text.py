"""Texts: how they are encoded, and through train, evaluate, predict and from_pretrained."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.utils import murmurhash3_32

from nestling import from_pretrained
from nestling.data.dataset import LabelledData
from nestling.data.text import BUCKETS, KINDS, LENGTH, TextEncoding, encoded, is_text, preprocessing_of
from nestling.engine import stage as engine_stage
from nestling.engine.optim import EPSILON, set_rate
from nestling.engine.run import Run
from nestling.errors import DataError, UsageError
from nestling.methods.coins import Coins
from nestling.methods.nested import Nested
from nestling.methods.recipe import Optimizer, Recipe
from nestling.models.build import build_model
from nestling.models.words import HASHED
from nestling.taxonomy import Taxonomy
from running import nestling, refuse, succeed
from small import Crash, Watch, assert_same_weights, checkpoint_every_epoch, quick

FAST = ("--backbone", "text:6/8", "--set", "epochs=1", "steps_per_epoch=2", "batch_size=16")
WORDS = {"a": "apple pie", "b": "banana bread", "c": "carrot cake", "d": "dill dip"}


def bucket(word: str) -> int:
    return 1 + murmurhash3_32(word, positive=True) % (BUCKETS - 1)


def test_a_text_by_hand() -> None:
    """Lower case, words of two characters at least, repeated to the end; pairs run on around it."""
    ids = TextEncoding(5).encode(["The CAT, a cat!"])
    assert ids.dtype == torch.int32 and ids.shape == (1, KINDS, 1, 5)
    the, cat = bucket("the"), bucket("cat")
    assert ids[0, 0, 0].tolist() == [the, cat, cat, -the, -cat], "what is repeated is negative"
    first, second = (murmurhash3_32(word, positive=True) for word in ("the", "cat"))
    assert ids[0, 1, 0, 0] == 1 + (first * 1_000_003 + second) % (BUCKETS - 1)


def test_empty_and_endless_texts() -> None:
    encoding = TextEncoding()
    assert encoding.encode(["", " . - ", "a b"]).eq(0).all()
    endless = encoding.encode(["word " * 200_000, "x" * 1_000_000])
    assert endless.shape == (2, KINDS, 1, LENGTH) and (endless[0] > 0).all() and endless.abs().max() < BUCKETS
    assert torch.equal(endless[0, 0], encoding.encode(["word"])[0, 0].abs()) and (endless[1, :, 0, 1:] < 0).all()
    assert encoding.encode([]).shape == (0, KINDS, 1, LENGTH)


def test_what_is_no_encoding_is_refused() -> None:
    for length in (0, 10**6):
        with pytest.raises(DataError, match="1 to 4096 words"):
            TextEncoding(length)
    assert preprocessing_of(TextEncoding(7).to_dict()) == TextEncoding(7)
    with pytest.raises(DataError, match="impossible preprocessing of texts"):
        preprocessing_of({"kind": "text", "length": "7", "buckets": BUCKETS})
    with pytest.raises(DataError, match="hashed into 32,768 buckets by another version of nestling"):
        preprocessing_of({"kind": "text", "length": 7, "buckets": 2**15})
    with pytest.raises(UsageError, match="expected encoded texts int32"):
        TextEncoding(7)(torch.zeros(2, 3, 8, 8))


def test_texts_are_known_by_their_shape(toy_data: LabelledData) -> None:
    assert is_text(TextEncoding().shape) and not is_text(toy_data.image_shape)
    assert encoded(toy_data) is toy_data


def sentences(count: int = 80) -> LabelledData:
    """Two words that tell the class, among others that do not."""
    taxonomy = Taxonomy.from_paths(["x/a", "x/b", "y/c", "y/d"])
    generator = np.random.default_rng(0)
    noise = [" ".join(generator.choice(["so", "and", "then", "thus", "yet"], 2)) for _ in range(count)]
    texts = [f"{noise[row]} {list(WORDS.values())[row % 4]} {noise[-row]}" for row in range(count)]
    return LabelledData(texts, taxonomy.encode([(None, "abcd"[row % 4]) for row in range(count)]), taxonomy)


@pytest.mark.parametrize("optimizer", [Optimizer(), Optimizer(name="sgd", lr=0.1)], ids=["adamw", "sgd"])
def test_words_that_tell_the_class_are_learned(optimizer: Optimizer) -> None:
    """Of four classes, on 40 sentences that choose the epoch; a guess is right in a quarter of them."""
    every = sentences(200)
    data, kept = every.subset(range(160)).keep({"fine": 0.5}), every.subset(range(160, 200))
    run = quick(Nested(epochs=(2, 12), optimizer=optimizer), data, validation=kept, backbone="text:12/12")
    assert run.metrics["accuracy"]["fine"] >= 0.8 and run.metrics["accuracy"]["coarse"] >= 0.8
    assert isinstance(run.preprocessing, TextEncoding)


def crashed_and_resumed(
    watch: Watch, recipe: Recipe, data: LabelledData, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Run:
    """A run that breaks off in its fifth step and goes on."""
    checkpoint_every_epoch(monkeypatch)
    watch.crash_at = 5
    with pytest.raises(Crash):
        quick(recipe, data, folder / "broken", backbone="text:6/8")
    return quick(recipe, data, folder / "broken", backbone="text:6/8")


def test_a_broken_run_on_texts_ends_as_an_unbroken_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two groups of parameters and the document frequencies; learning rates by group."""
    data, recipe = sentences(60).keep({"fine": 0.5}), Nested(epochs=(2, 2), batch_size=16)
    whole = quick(recipe, data, tmp_path / "whole", backbone="text:6/8")
    watch, rates = Watch(monkeypatch), []

    def watched(optimizer: torch.optim.Optimizer, lr: float) -> None:
        set_rate(optimizer, lr)
        own, words = (group["lr"] for group in optimizer.param_groups)
        rates.append(words / own)

    monkeypatch.setattr(engine_stage, "set_rate", watched)
    broken = crashed_and_resumed(watch, recipe, data, tmp_path, monkeypatch)
    assert_same_weights(broken.model, whole.model)
    assert broken.model.state_dict()["words.documents"][0] > 0
    assert rates == pytest.approx([EPSILON] * len(rates)) and len(rates) == len(watch.taken)


def test_a_broken_search_run_on_texts_counts_each_text_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, recipe = sentences(60), Coins(variant="coins-imp", epochs=3, batch_size=16)
    whole = quick(recipe, data, tmp_path / "whole", backbone="text:6/8")
    watch = Watch(monkeypatch)
    broken = crashed_and_resumed(watch, recipe, data, tmp_path, monkeypatch)
    assert_same_weights(broken.model, whole.model)
    assert broken.model.state_dict()["words.documents"][0] == whole.model.state_dict()["words.documents"][0] > 0


@pytest.mark.parametrize("method", ["layerwise", "robust"])
def test_methods_for_pictures_refuse_texts(method: str) -> None:
    with pytest.raises(UsageError, match=f"{method} takes pictures, and the inputs are texts"):
        build_model(sentences(8).taxonomy, TextEncoding().shape, method=method)


@pytest.mark.parametrize("name", ["text:", "text:4/a", "text:0", "text:" + "/".join("4" * 9)])
def test_backbones_for_texts_that_cannot_be(name: str) -> None:
    with pytest.raises(UsageError, match="cannot read the backbone"):
        build_model(sentences(8).taxonomy, TextEncoding().shape, name)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table of texts, with an empty one and one of a megabyte."""
    folder = tmp_path_factory.mktemp("texts")
    data = sentences(60)
    texts = list(data.inputs)
    texts[3], texts[7] = "", "dill dip " * 120_000
    lines = [f"{text},{'xxyy'[row % 4]},{'abcd'[row % 4]}" for row, text in enumerate(texts)]
    (folder / "source.csv").write_text("\n".join(["text,coarse,fine", *lines]), encoding="utf-8")
    (folder / "note.txt").write_text("banana bread", encoding="utf-8")
    (folder / "empty.txt").write_text("", encoding="utf-8")
    (folder / "binary.txt").write_bytes(b"\xff\xfe\x00\x81")
    succeed("train", folder / "source.csv", "--out", folder / "run", *FAST)
    return folder


def test_from_a_table_to_a_run(trained: Path) -> None:
    metrics = json.loads((trained / "run" / "metrics.json").read_text())
    assert [level["name"] for level in metrics["levels"]] == ["coarse", "fine"] and metrics["distortions"] == {}
    assert "banana bread" in (trained / "run" / "report.html").read_text(encoding="utf-8")
    done = succeed("evaluate", trained / "run", "--source", trained / "source.csv", "--json", "-")
    again = json.loads(done.out)
    assert again["levels"] == metrics["levels"]
    refuse(2, ["turbulence:1,1", "texts"], "evaluate", trained / "run", "--distort", "turbulence:1,1")


def test_texts_are_predicted(trained: Path) -> None:
    files = [trained / name for name in ("note.txt", "empty.txt", "binary.txt", "none.txt")]
    done = nestling("predict", trained / "run", *files, "--json", "-")
    found = json.loads(done.out)
    assert done.code == 3 and [len(result.get("path", ())) for result in found] == [2, 2, 0, 0]
    assert "UTF-8" in found[2]["error"] and "no such file" in found[3]["error"]
    predictor = from_pretrained(trained / "run", device="cpu")
    long = "banana bread " * 80_000
    answers = predictor.predict(["banana bread", "", long])
    assert [answer["input"] for answer in answers] == ["banana bread", "", long[:80]]
    assert answers[0]["path"] == found[0]["path"] and predictor.embed(["one"]).shape == (1, 8 + HASHED)
    assert predictor.predict_proba([])["fine"].shape == (0, 4)
    with pytest.raises(DataError, match="the model reads texts, expected a string, got PosixPath"):
        predictor.predict([Path("note.txt")])
    with pytest.raises(UsageError, match="put what there is in a list"):
        predictor.predict("banana bread")


def test_texts_have_no_pixels_to_move(trained: Path) -> None:
    refuse(
        2, ["moves pixels", "texts"],
        "train", trained / "source.csv", "--out", trained / "other", *FAST, "--set", "augmentation=crop",
    )  # fmt: skip
