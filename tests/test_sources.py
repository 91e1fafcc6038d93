"""Sources: what each kind becomes, and what is said where it is wrong."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nestling.data import CATALOGUE, LabelledData, available_splits, has_split, hub, load_data
from nestling.errors import DataError, StorageError, UsageError
from nestling.taxonomy import Taxonomy

pyarrow = pytest.importorskip("pyarrow")
parquet = pytest.importorskip("pyarrow.parquet")

ROWS = [("animal", "owl"), ("animal", "wren"), ("plant", "oak"), ("plant", "ash")] * 6


@pytest.fixture(autouse=True)
def no_real_data(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if "nestling_data" not in request.fixturenames:
        monkeypatch.delenv("NESTLING_DATA", raising=False)


def png(shade: int, size: int = 4) -> bytes:
    buffer = BytesIO()
    Image.new("L", (size, size), shade).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(path: Path, metadata: dict[bytes, bytes] | None = None, **columns) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.table(columns)
    parquet.write_table(table.replace_schema_metadata(metadata), path)
    return path


def picture_table(path: Path, rows=ROWS, **more) -> Path:
    pictures = [{"bytes": png(shade), "path": None} for shade in range(len(rows))]
    coarse, fine = zip(*rows, strict=True)
    return write_parquet(path, image=pictures, coarse=list(coarse), fine=list(fine), **more)


def text_csv(path: Path, rows=ROWS, header: str = "text,coarse,fine") -> Path:
    path.write_text("\n".join([header, *(f"t{row},{','.join(names)}" for row, names in enumerate(rows))]) + "\n")
    return path


def folder_tree(root: Path, names=("animal/owl", "animal/wren", "plant/oak"), count: int = 5) -> Path:
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True, exist_ok=True)
        for row in range(count):
            (root / name / f"{row}.png").write_bytes(png(10 * number + row))
    return root


def names(data: LabelledData, row: int) -> list[str | None]:
    return [
        data.taxonomy.classes[level][code] if code >= 0 else None
        for level, code in zip(data.taxonomy.levels, data.labels[row].tolist(), strict=True)
    ]


# digits ------------------------------------------------------------------------------------------------------------


def test_digits() -> None:
    from sklearn.datasets import load_digits

    train, test = load_data("digits"), load_data("digits", "test", seed=5)
    assert train.inputs.shape == (1347, 1, 8, 8)
    assert len(test) == 450
    assert train.taxonomy == test.taxonomy
    assert train.taxonomy.levels == ("coarse", "middle", "fine")
    assert train.taxonomy.classes["coarse"] == ("coarse1 (0,3,5,6,8)", "coarse2 (1,2,4,7,9)")
    source = load_digits()
    rows = [int(item.removeprefix("digits row ")) for item in (*train.items, *test.items)]
    assert sorted(rows) == list(range(1797))
    assert rows[:1347] == sorted(rows[:1347])
    whole = torch.cat([train.inputs, test.inputs])[:, 0].numpy()
    assert (whole == np.round(source.images[rows] * 255 / 16)).all()
    for data, place in ((train, 0), (test, 1347)):
        for row in range(0, 400, 37):
            coarse, middle, fine = names(data, row)
            assert fine == str(source.target[rows[place + row]])
            assert fine in str(middle).split("(")[1]
            assert fine in str(coarse).split("(")[1]
    counts = np.bincount(source.target[rows[1347:]])
    assert np.abs(counts - np.bincount(source.target) / 4).max() < 1
    assert len(load_data("digits", "all")) == 1797
    assert available_splits("digits") == ("train", "test")
    assert load_data("digits", image_size=12).inputs.shape == (1347, 1, 12, 12)


# Folders -----------------------------------------------------------------------------------------------------------


def test_folder_tree_is_cut_and_says_so(tmp_path: Path) -> None:
    root = folder_tree(tmp_path / "pets")
    train, test = load_data(root), load_data(str(root), "test")
    assert (len(train), len(test)) == (12, 3)
    assert train.name == "pets"
    assert train.taxonomy.levels == ("coarse", "fine")
    assert train.taxonomy.classes["fine"] == ("owl", "wren", "oak")
    assert not set(train.items) & set(test.items)
    assert "cut 80/20, stratified by class, seed 0" in train.notes[0]
    assert names(train, 0) == ["animal", "owl"]
    assert load_data(root, seed=2).items != train.items
    assert len(load_data(root, "all")) == 15
    assert load_data(root, levels=("kingdom", "species")).taxonomy.levels == ("kingdom", "species")


def test_folder_with_splits_has_one_taxonomy(tmp_path: Path) -> None:
    folder_tree(tmp_path / "train", ["a/x", "a/y"])
    folder_tree(tmp_path / "Test", ["a/x", "b/z"], count=2)
    folder_tree(tmp_path / "val", ["a/x"], count=1)
    train, test = load_data(tmp_path), load_data(tmp_path, "test")
    assert train.taxonomy == test.taxonomy
    assert train.taxonomy.classes["fine"] == ("x", "y", "z")
    assert (len(train), len(test), len(load_data(tmp_path, "validation"))) == (10, 4, 1)
    assert len(load_data(tmp_path, "all")) == 15
    assert available_splits(tmp_path) == ("train", "validation", "test")
    assert has_split(tmp_path, "validation")
    (tmp_path / "train" / "a" / "new").mkdir()
    assert load_data(tmp_path).taxonomy == train.taxonomy, "a folder without pictures is no class"


def test_class_folders_may_be_called_as_splits(tmp_path: Path) -> None:
    folder_tree(tmp_path, ["train", "bus", "tram"])
    data = load_data(tmp_path, "all")
    assert set(data.taxonomy.classes[data.taxonomy.levels[0]]) == {"train", "bus", "tram"}


def test_ragged_folders_and_same_names(tmp_path: Path) -> None:
    folder_tree(tmp_path, ["fruit/other", "veg/other", "bread"])
    (tmp_path / "fruit" / "apple.png").write_bytes(png(1))
    (tmp_path / "loose.png").write_bytes(png(1))
    data = load_data(tmp_path, "all")
    assert data.taxonomy.classes["fine"] == ("fruit/other", "veg/other")
    found = dict(zip(data.items, range(len(data)), strict=True))
    assert names(data, found[str(tmp_path / "veg" / "other" / "0.png")]) == ["veg", "veg/other"]
    assert names(data, found[str(tmp_path / "fruit" / "apple.png")]) == ["fruit", None]
    assert names(data, found[str(tmp_path / "bread" / "0.png")]) == ["bread", None]
    assert data.finest_known()[found[str(tmp_path / "bread" / "0.png")]] == 1
    assert data.finest_known()[found[str(tmp_path / "loose.png")]] == -1
    assert "1 pictures lie in no class folder: they are rows without a label" in data.notes


def test_folder_with_a_taxonomy(tmp_path: Path) -> None:
    folder_tree(tmp_path / "flat", ["owl", "oak", "animal"], count=2)
    edges = tmp_path / "edges.csv"
    edges.write_text("parent,child\nanimal,owl\nanimal,wren\nplant,oak\n")
    data = load_data(tmp_path / "flat", "all", taxonomy=edges)
    assert data.taxonomy == Taxonomy.load(edges)
    assert [names(data, row) for row in (0, 2, 4)] == [["animal", None], ["plant", "oak"], ["animal", "owl"]]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "the folder holds no pictures .expected class folders"),
        (lambda root: (root / "a.png").write_bytes(png(1)), "its pictures lie in no class folders"),
        (lambda root: folder_tree(root, ["train/a", "training/a", "test/a"]), "name the same split"),
        (lambda root: (folder_tree(root, ["a", "b"]), (root / "a" / "0.png").write_bytes(b"?")), r"a.0\.png: is no"),
    ],
)
def test_bad_folders(tmp_path: Path, make, message: str) -> None:
    make(tmp_path)
    with pytest.raises(DataError, match=message):
        load_data(tmp_path, "all")


def test_skipping_bad_pictures(tmp_path: Path) -> None:
    folder_tree(tmp_path, ["a", "b"])
    (tmp_path / "a" / "3.png").write_bytes(b"?")
    data = load_data(tmp_path, "all", on_bad_image="skip")
    assert len(data) == 9
    assert data.index.tolist() == list(range(9))
    assert not any(item.endswith("a/3.png") for item in data.items)
    assert any("left out, because unreadable: 1 of 10 pictures" in note for note in data.notes)
    with pytest.raises(UsageError, match=r"unknown way to treat bad images ignore"):
        load_data(tmp_path, on_bad_image="ignore")  # type: ignore[arg-type]


# CSV ---------------------------------------------------------------------------------------------------------------


def test_csv_of_pictures(tmp_path: Path) -> None:
    folder_tree(tmp_path / "pictures", ["p"], count=4)
    table = tmp_path / "table.csv"
    table.write_text(
        "\ufeffpath,id,split,group,coarse,fine\n"
        "pictures/p/0.png,one,train,g,animal,owl\npictures/p/1.png,,train,g,animal,\n\n"
        "pictures/p/2.png,three,val,,plant,oak\n"
        f"{tmp_path}/pictures/p/3.png,four,test,h,,oak\n",
        encoding="utf-8",
    )
    train = load_data(table)
    assert train.items == ("one", str(tmp_path / "pictures/p/1.png"))
    assert [names(train, row) for row in range(2)] == [["animal", "owl"], ["animal", None]]
    assert train.groups is not None
    assert len(set(train.groups.tolist())) == 1
    assert train.inputs[:, 0, 0, 0].tolist() == [0, 1]
    assert names(load_data(table, "test"), 0) == ["plant", "oak"]
    assert available_splits(table) == ("train", "validation", "test")
    assert len(load_data(table, "all")) == 4


def test_csv_of_texts_with_other_delimiters(tmp_path: Path) -> None:
    for name, mark in (("a.tsv", "\t"), ("b.csv", ";"), ("c.csv", ",")):
        table = tmp_path / name
        rows = [mark.join((f't "{row}"'.replace('"', '""').join('""'), *pair)) for row, pair in enumerate(ROWS)]
        table.write_text("\n".join([mark.join(("text", "coarse", "fine")), *rows]))
        data = load_data(table, "all")
        assert data.inputs[:2] == ['t "0"', 't "1"']
        assert data.taxonomy.classes["fine"] == ("owl", "wren", "ash", "oak")
        assert data.items[3] == f"{name} row 3"
    long = tmp_path / "long.csv"
    long.write_text("text,coarse\n" + "x" * 200_000 + ",a\ny,b\n")
    assert len(load_data(long, "all").inputs[0]) == 200_000


def test_groups_stay_whole_in_the_cut(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("text,group,kind\n" + "".join(f"t{row},g{row // 4},{'ab'[row // 4 % 2]}\n" for row in range(80)))
    train, test = load_data(table), load_data(table, "test")
    assert len(train) + len(test) == 80
    assert len(test) == 16
    held = [{int(text[1:]) // 4 for text in data.inputs} for data in (train, test)]
    assert not held[0] & held[1]
    assert "groups kept whole" in train.notes[0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "t.csv: the table is empty"),
        (b"\n \n", "t.csv: the table is empty"),
        (b"text,fine\n", "t.csv: the table has a header and no rows"),
        (b"title,fine\na,b\n", "no column 'path' .* or 'text'; its columns are 'title', 'fine'"),
        (b"text,fine,fine\na,b,c\n", "the column 'fine' stands in the header twice"),
        (b"text,fine\na,b,c\n", "line 2 has 3 cells, the header 2"),
        (b"text,fine\na\n", "line 2 has 1 cells, the header 2"),
        (b'text,fine\n"a,b\n', "t.csv: no proper table"),
        ("text,fine\nä,b\n".encode("latin-1"), "t.csv: line 2 is not UTF-8: save the table as UTF-8"),
        ("text,fine\na,b\n".encode("utf-16"), "is not UTF-8"),
        (b"text\na\n", "there is no column of labels"),
        (b"text,fine\na,\nb,\n", "no row is labelled: the columns 'fine' are empty"),
        (b"text,split,fine\na,,b\n", "t.csv row 0: the column 'split' is empty"),
        (b"text,split,fine\na,all,b\n", "the split 'all' stands for every row"),
        (b"path,fine\nmissing.png,b\n", "missing.png: there is no such file"),
        (b"path,fine\n,b\n", "t.csv row 0: there is no picture"),
    ],
)
def test_bad_csv(tmp_path: Path, content: bytes, message: str) -> None:
    table = tmp_path / "t.csv"
    table.write_bytes(content)
    with pytest.raises(DataError, match=message):
        load_data(table, "all")


def test_labels_that_contradict_name_their_rows(tmp_path: Path) -> None:
    rows = [*ROWS, ("plant", "owl")]
    with pytest.raises(DataError, match=r"t\.csv: .*'owl'.*24.*"):
        load_data(text_csv(tmp_path / "t.csv", rows))
    with pytest.raises(DataError, match=r"where the columns 'coarse', 'fine' are not in order, .* --levels a,b,c"):
        load_data(tmp_path / "t.csv")
    data = load_data(text_csv(tmp_path / "t.csv", rows), "all", qualify_names=True)
    assert data.taxonomy.classes["fine"] == ("animal/owl", "wren", "ash", "oak", "plant/owl")
    assert names(data, 24) == ["plant", "plant/owl"]
    tree = Taxonomy.from_paths({f"{coarse}/{fine}" for coarse, fine in ROWS})
    with pytest.raises(DataError, match=r"row 24: fine 'owl' is a 'animal', but coarse says 'plant'"):
        load_data(tmp_path / "t.csv", taxonomy=tree)
    with pytest.raises(DataError, match=r"'fine' \(row 1\) owll: expected one of .*'owl'"):
        load_data(text_csv(tmp_path / "u.csv", [("animal", "owl"), ("animal", "owll")]), taxonomy=tree)


def test_columns_of_their_own_value_are_refused(tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    table.write_text("text,coarse,author\n" + "".join(f"t,{'ab'[row % 2]},person {row}\n" for row in range(30)))
    with pytest.raises(DataError, match=r"column 'author' cannot be a level: 30 of 30 rows .* --levels a,b,c"):
        load_data(table)
    assert load_data(table, levels=("coarse",)).taxonomy.levels == ("coarse",)
    with pytest.raises(UsageError, match=r"unknown level of .* corse: .*Did you mean 'coarse'"):
        load_data(table, levels=("corse",))
    with pytest.raises(UsageError, match=r"different names"):
        load_data(table, levels=("coarse", "coarse"))
    few = text_csv(tmp_path / "few.csv", [("a", "x"), ("a", "y"), ("b", "z")])
    assert len(load_data(few, "all").taxonomy.classes["fine"]) == 3


def test_one_class_or_one_row(tmp_path: Path) -> None:
    data = load_data(text_csv(tmp_path / "t.csv", [("a", "x")]), "all")
    assert names(data, 0) == ["a", "x"]
    assert len(load_data(tmp_path / "t.csv")) == 1
    with pytest.raises(DataError, match=r"its 1 rows are too few to cut a test split"):
        load_data(tmp_path / "t.csv", "test")


# Parquet -----------------------------------------------------------------------------------------------------------


def test_parquet_file(tmp_path: Path) -> None:
    table = picture_table(tmp_path / "t.parquet")
    data = load_data(table, "all")
    assert data.inputs[:, 0, 0, 0].tolist() == list(range(24))
    assert [tuple(names(data, row)) for row in range(4)] == ROWS[:4]
    assert data.items[3] == "t.parquet row 3"
    train, test = load_data(table), load_data(table, "test")
    assert sorted([*train.inputs[:, 0, 0, 0].tolist(), *test.inputs[:, 0, 0, 0].tolist()]) == list(range(24))
    for row, item in enumerate(test.items):
        assert int(test.inputs[row, 0, 0, 0]) == int(item.split()[-1]), "labels and pictures stay together"


def test_parquet_kinds_of_columns(tmp_path: Path) -> None:
    (tmp_path / "9.png").write_bytes(png(9))
    features = {"info": {"features": {"fine": {"_type": "ClassLabel", "names": ["owl", "oak"]}}}}
    table = write_parquet(
        tmp_path / "t.parquet",
        {b"huggingface": json.dumps(features).encode()},
        image=[{"bytes": png(7), "path": "x"}, {"bytes": None, "path": "9.png"}, {"bytes": png(8), "path": None}],
        number=pyarrow.array([3.0, None, 3.0]),
        flag=pyarrow.array([True, True, True]),
        word=pyarrow.array(["a", "", "a"]).dictionary_encode(),
        fine=pyarrow.array([0, -1, 1]),
    )
    data = load_data(table, "all")
    assert data.inputs[:, 0, 0, 0].tolist() == [7, 9, 8]
    assert data.taxonomy.levels == ("number", "flag", "word", "fine")
    assert [names(data, row) for row in range(3)] == [
        ["3", "true", "a", "owl"],
        ["3", "true", None, None],
        ["3", "true", "a", "oak"],
    ]
    plain = write_parquet(tmp_path / "b.parquet", image=[png(1), png(2)], fine=[5, 6])
    assert load_data(plain, "all").taxonomy.classes["fine"] == ("5", "6")
    box = write_parquet(tmp_path / "c.parquet", image=[png(1)] * 2, fine=["a", "b"], box=[[1, 2], [3, 4]])
    with pytest.raises(DataError, match=r"column 'box' cannot be a level: it holds .*--levels"):
        load_data(box)
    assert len(load_data(box, "all", levels=("fine",))) == 2


def test_shards_and_splits_from_the_data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for shard in range(3):
        picture_table(tmp_path / "cifar100" / f"train-0000{shard}-of-00003.parquet", ROWS[: 4 + shard])
    picture_table(tmp_path / "cifar100" / "test.parquet", [("plant", "fern")])
    train = load_data("cifar100", data_dir=tmp_path)
    assert len(train) == 15
    assert train.inputs[:, 0, 0, 0].tolist() == [*range(4), *range(5), *range(6)]
    assert train.items[14] == "cifar100/train row 14"
    assert "fern" in train.taxonomy.classes["fine"], "classes that a split lacks keep their code"
    monkeypatch.setenv("NESTLING_DATA", str(tmp_path))
    assert load_data("cifar100", "test").taxonomy == train.taxonomy
    assert len(load_data(tmp_path / "cifar100", "all")) == 16
    assert available_splits("cifar100") == ("train", "test")
    with pytest.raises(UsageError, match=r"unknown split of cifar100 validation: .*'train', 'test', 'all'"):
        load_data("cifar100", "validation")
    (tmp_path / "cifar100" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(StorageError, match=r"holds 2 of the 3 files of 'train'"):
        load_data("cifar100")


def test_bad_parquet(tmp_path: Path) -> None:
    good = picture_table(tmp_path / "t.parquet")
    content = good.read_bytes()
    for length in (0, 3, len(content) // 2, len(content) - 1):
        (tmp_path / "cut.parquet").write_bytes(content[:length])
        with pytest.raises(DataError, match=r"cut.parquet: damaged, or no Parquet file"):
            load_data(tmp_path / "cut.parquet")
    damaged = bytearray(content)
    damaged[4:400] = bytes(396)
    (tmp_path / "zeros.parquet").write_bytes(damaged)
    with pytest.raises(DataError, match=r"zeros\.parquet"):
        load_data(tmp_path / "zeros.parquet")
    nobody = pyarrow.array([], "string")
    empty = write_parquet(tmp_path / "empty.parquet", text=nobody, fine=nobody)
    with pytest.raises(DataError, match=r"empty.parquet: the table has no rows"):
        load_data(empty)
    with pytest.raises(DataError, match=r"no column 'image' or 'text'; its columns are 'title', 'fine'"):
        load_data(write_parquet(tmp_path / "n.parquet", title=["a"], fine=["b"]))
    with pytest.raises(DataError, match=r"must hold encoded pictures .bytes. or paths; it holds int64"):
        load_data(write_parquet(tmp_path / "i.parquet", image=[1, 2], fine=["a", "b"]), "all")
    nothing = write_parquet(tmp_path / "x.parquet", text=pyarrow.array(["a", None]), fine=["a", "b"])
    with pytest.raises(DataError, match=r"x\.parquet row 1: there is no text"):
        load_data(nothing, "all")
    assert load_data(nothing, "all", on_bad_image="skip").inputs == ["a"]
    picture = write_parquet(tmp_path / "p.parquet", image=[png(1), png(2)[:-30]], fine=["a", "b"])
    with pytest.raises(DataError, match=r"p\.parquet row 1: cannot be read as a picture.*skip"):
        load_data(picture, "all")


def test_random_damage_never_escapes(tmp_path: Path) -> None:
    content = np.frombuffer(picture_table(tmp_path / "t.parquet").read_bytes(), dtype=np.uint8)
    generator = np.random.default_rng(0)
    bad = tmp_path / "bad.parquet"
    for _ in range(60):
        damaged = content.copy()
        damaged[generator.integers(0, len(damaged), 3)] = generator.integers(0, 256, 3)
        bad.write_bytes(damaged.tobytes())
        with suppress(DataError, UsageError):
            load_data(bad, "all")


def test_splits_of_files(tmp_path: Path) -> None:
    text_csv(tmp_path / "train.csv")
    text_csv(tmp_path / "val.csv", ROWS[:4])
    assert available_splits(tmp_path) == ("train", "validation", "test")
    assert len(load_data(tmp_path, "validation")) == 4
    train, test = load_data(tmp_path), load_data(tmp_path, "test")
    assert len(train) + len(test) == 24
    assert "because the source has no test split" in test.notes[0]
    picture_table(tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"holds the split 'train' more than once"):
        load_data(tmp_path)
    (tmp_path / "train.csv").unlink()
    with pytest.raises(DataError, match=r"some of its splits hold pictures and some texts"):
        load_data(tmp_path)


def test_only_a_test_split(tmp_path: Path) -> None:
    text_csv(tmp_path / "test.csv")
    assert len(load_data(tmp_path, "test")) == 24
    with pytest.raises(UsageError, match=r"unknown split of .* train: expected one of 'test', 'all'"):
        load_data(tmp_path)
    # The name as it was typed, not what it stands for.
    with pytest.raises(UsageError, match=r"unknown split of .* valid: expected"):
        load_data(tmp_path, "valid")


def test_a_picture_in_two_rows_is_warned_of(tmp_path: Path) -> None:
    """Whichever splits they are in."""
    folder_tree(tmp_path / "pictures", ["p"], count=2)
    table = tmp_path / "table.csv"
    table.write_text("path,split,kind\npictures/p/0.png,train,a\npictures/p/1.png,train,b\npictures/p/0.png,test,a\n")
    for split in ("train", "test"):
        notes = load_data(table, split).notes
        assert any("warning: 1 input stands in more than one row" in note and "0.png" in note for note in notes)
    table.write_text("path,split,kind\npictures/p/0.png,train,a\npictures/p/1.png,train,b\n")
    assert not any("warning" in note for note in load_data(table).notes)


# Names, hub --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("mnits", "unknown source mnits: expected one of 'digits', .*'mnist', .* Did you mean 'mnist'\\?"),
        ("./mnist", "there is no such file or folder"),
        ("nothing.csv", "there is no such file or folder"),
        (Path("nothing"), "there is no such file or folder"),
        ("", "the source is empty"),
        ("hf:name", "written hf:owner/name"),
        ("hf:../x/y", "written hf:owner/name"),
        ("a\0b", "."),
    ],
)
def test_unknown_sources(source: str | Path, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=message):
        load_data(source)


def test_a_file_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text("{}")
    with pytest.raises(UsageError, match=r"a file must be one of .parquet, .csv, .tsv; got '.json'"):
        load_data(tmp_path / "t.json")


def test_a_folder_called_as_a_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_tree(tmp_path / "digits")
    monkeypatch.chdir(tmp_path)
    assert len(load_data("digits")) == 1347
    assert len(load_data("./digits", "all")) == 15


def test_sets_without_a_hub_source_say_where_they_could_be(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"'grocery' has no source on the hub; .* lack .*pass --data-dir DIR"):
        load_data("grocery", data_dir=tmp_path / "nowhere")


@pytest.mark.parametrize("source", ["mnist", "hf:owner/name"])
def test_no_network_is_said_within_ten_seconds(source: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import huggingface_hub

    def never(*arguments, **options):
        time.sleep(30)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", never)
    monkeypatch.setattr(hub, "TIMEOUT", 0.2)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    start = time.monotonic()
    with pytest.raises(StorageError, match=r"no answer within 0.2 s; ") as caught:
        load_data(source)
    assert time.monotonic() - start < 5
    assert caught.value.exit_code == 5
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", fail)
    with pytest.raises(StorageError, match=r"cannot read hf:.*: OSError: no route to host; .*"):
        load_data(source)


def fail(*arguments, **options):
    raise OSError("no route to host")


def fake_hub(monkeypatch: pytest.MonkeyPatch, root: Path, revisions: dict[str | None, list[str]]) -> None:
    import huggingface_hub

    def dataset_info(self, repository, *, revision=None, timeout=None):
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in revisions[revision]])

    def hf_hub_download(self, repository, name, *, repo_type, revision=None):
        assert repo_type == "dataset"
        return str(root / name)

    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    monkeypatch.setattr(huggingface_hub.HfApi, "hf_hub_download", hf_hub_download)


def test_hub_with_one_flat_label(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CIFAR-10 on the hub: an ``img`` column and the codes of the finest level; the tree is ours."""
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": [f"c{code}" for code in range(10)]}}}}
    for split in ("train", "test"):
        write_parquet(
            tmp_path / f"plain_text/{split}-00000-of-00001.parquet",
            {b"huggingface": json.dumps(features).encode()},
            img=[{"bytes": png(code), "path": None} for code in range(10)],
            label=list(range(10)),
        )
    files = [f"plain_text/{split}-00000-of-00001.parquet" for split in ("train", "test")]
    fake_hub(monkeypatch, tmp_path, {None: ["README.md", *files]})
    data = load_data("cifar10", "test")
    assert data.taxonomy.levels == ("coarse", "middle", "fine")
    assert names(data, 3) == ["animal", "cat or dog", "cat"]
    assert names(data, 9) == ["vehicle", "road vehicle", "truck"]
    assert data.notes[0] == "read from the hub: uoft-cs/cifar10"
    # The same files in the data dir read the same.
    (tmp_path / "local").mkdir()
    (tmp_path / "plain_text").rename(tmp_path / "local" / "cifar10")
    assert names(load_data("cifar10", data_dir=tmp_path / "local"), 9) == ["vehicle", "road vehicle", "truck"]


def test_hub_from_the_converted_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DBPedia on the hub is CSV; the hub's own conversion to Parquet is read."""
    name = "default/train/0000.parquet"
    write_parquet(tmp_path / name, text=["a", "b"], l1=["x", "y"], l2=["m", "n"], l3=["p", "q"])
    fake_hub(monkeypatch, tmp_path, {None: ["DBPEDIA_train.csv"], hub.CONVERTED: [name]})
    data = load_data("dbpedia", "all")
    assert data.taxonomy.levels == ("coarse", "middle", "fine")
    assert data.inputs == ["a", "b"]
    other = load_data("hf:DeveloperOats/DBPedia_Classes", "all")
    assert other.taxonomy.levels == ("l1", "l2", "l3")
    assert other.name == "DeveloperOats/DBPedia_Classes"


def hub_table(path: Path, classes: list[str], codes: list[int]) -> Path:
    """Pictures and the codes of their classes, as the hub keeps them."""
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": classes}}}}
    return write_parquet(
        path,
        {b"huggingface": json.dumps(features).encode()},
        image=[{"bytes": png(shade), "path": None} for shade in range(len(codes))],
        label=codes,
    )


def test_hub_with_two_configurations(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SVHN: the cropped digits are meant, and not the 531,131 extra ones."""
    folders, splits = ("cropped_digits", "full_numbers"), ("train", "test", "extra")
    files = [f"{folder}/{split}-00000-of-00001.parquet" for folder in folders for split in splits]
    for name in files[:2]:
        hub_table(tmp_path / name, list("0123456789"), [3, 7, 3])
    fake_hub(monkeypatch, tmp_path, {None: files})
    data = load_data("svhn", "test")
    assert data.taxonomy.levels == ("fine",)
    assert data.labels[:, 0].tolist() == [0, 1, 0]
    assert data.taxonomy.classes["fine"] == ("3", "7")
    assert available_splits("svhn") == ("train", "test")
    with pytest.raises(UsageError, match=r"several configurations"):
        load_data("hf:ufldl-stanford/svhn")


def test_hub_whose_test_rows_have_no_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ImageNet: its validation rows are what every paper tests on; the unlabelled ones are not even fetched."""
    files = [f"data/{split}-00000-of-00001.parquet" for split in ("train", "validation", "test")]
    hub_table(tmp_path / files[0], ["tench, Tinca tinca", "goldfish"], [0, 1, 0])
    hub_table(tmp_path / files[1], ["tench, Tinca tinca", "goldfish"], [0, 1])
    fake_hub(monkeypatch, tmp_path, {None: files})
    assert available_splits("imagenet") == ("train", "test")
    data = load_data("imagenet", "test")
    assert [names(data, row) for row in (0, 1)] == [["tench, Tinca tinca"], ["goldfish"]]


def test_hub_of_newsgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "default/train/0000.parquet"
    write_parquet(tmp_path / name, text=["", "b"], label=[0, 5], label_text=["alt.atheism", "comp.windows.x"])
    fake_hub(monkeypatch, tmp_path, {None: ["train.jsonl"], hub.CONVERTED: [name]})
    data = load_data("newsgroups20", "all")
    assert [names(data, row) for row in (0, 1)] == [["religion", "alt.atheism"], ["computers", "comp.windows.x"]]


def test_a_set_split_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stanford Online Products: the rows of both files, so many to train, and no product that only one row tests."""
    products = [f"product {number // 3}" for number in range(60)]
    for split, rows in (("train", range(30)), ("test", range(30, 60))):
        write_parquet(
            tmp_path / "sop" / f"{split}.parquet",
            image=[{"bytes": png(row), "path": None} for row in rows],
            coarse=["chair" if row < 30 else "sofa" for row in rows],
            fine=[products[row] for row in rows],
        )
    assert len(load_data("sop", "test", tmp_path)) == 30
    with pytest.raises(DataError, match=r"it has 60 rows, too few to draw 80,000"):
        load_data("sop_random", data_dir=tmp_path)
    smaller = {**CATALOGUE, "sop_random": replace(CATALOGUE["sop_random"], num_train=40)}
    monkeypatch.setattr("nestling.data.resolve.CATALOGUE", smaller)
    train, test = (load_data("sop_random", split, tmp_path) for split in ("train", "test"))
    shades = [part.inputs[:, 0, 0, 0].tolist() for part in (train, test)]
    assert len(shades[0]) == 40
    assert shades[0] == sorted(shades[0])
    left = [row for row in range(60) if row not in shades[0]]
    rest = [products[row] for row in left]
    assert shades[1] == [row for row in left if rest.count(products[row]) > 1] != []
    assert [names(test, row)[1] for row in range(len(test))] == [products[row] for row in shades[1]]
    assert load_data("sop_random", data_dir=tmp_path, seed=5).inputs[:, 0, 0, 0].tolist() == shades[0]
    with pytest.raises(StorageError, match=r"'sop_random' has no source on the hub; .*DIR holds sop/train.parquet"):
        load_data("sop_random", data_dir=tmp_path / "nowhere")


def test_choosing_files_of_a_repository() -> None:
    one = ["data/train-00000-of-00002-abc.parquet", "data/train-00001-of-00002-def.parquet", "data/validation.parquet"]
    assert hub.choose_files("o/n", one) == {"train": one[:2], "validation": one[2:]}
    assert hub.choose_files("o/n", ["README.md", "x.csv"]) == {}
    assert list(hub.choose_files("o/n", ["n/train.parquet", "m/train.parquet"]).values()) == [["n/train.parquet"]]
    with pytest.raises(UsageError, match=r"several configurations \('a', 'b'\)"):
        hub.choose_files("o/n", ["a/train.parquet", "b/train.parquet"])
    with pytest.raises(StorageError, match=r"1 of the 2 files of 'train'"):
        hub.choose_files("o/n", one[:1])


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    table = picture_table(tmp_path / "t.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UsageError, match=r"reading t.parquet needs the package 'pyarrow': .*nestling\[hub\]"):
        load_data(table)
    with pytest.raises(UsageError, match=r"needs the package 'huggingface-hub': .*nestling\[hub\]"):
        load_data("hf:owner/name")


# Real sets ---------------------------------------------------------------------------------------------------------

EXPECTED = {
    "mnist": (10_000, [2, 4, 10]),
    "fashion_mnist": (10_000, [2, 4, 10]),
    "cifar10": (10_000, [2, 5, 10]),
    "cifar100": (10_000, [20, 100]),
    "plantvillage": (1_730, [3, 6, 15]),
    "grocery": (2_485, [3, 43, 81]),
    "newsgroups20": (7_532, [6, 20]),
    "tiny_imagenet32": (5_000, [8, 37, 200]),
    "dbpedia": (1_007, [9, 70, 219]),
    "caltech101": (1_195, [101]),
}


NOT_AT_HAND = {"svhn", "sop", "sop_random", "imagenet"}


def test_every_known_set_is_expected() -> None:
    assert set(EXPECTED) | NOT_AT_HAND | {"digits", "digit-pairs", "patches"} == set(CATALOGUE)


@pytest.mark.parametrize("name", EXPECTED)
def test_real_sets(name: str, nestling_data: Path) -> None:
    rows, classes = EXPECTED[name]
    data = load_data(name, "test", nestling_data)
    assert len(data) == rows
    assert [len(data.taxonomy.classes[level]) for level in data.taxonomy.levels] == classes
    assert data.taxonomy.levels == CATALOGUE[name].levels
    assert (data.finest_known() == len(classes) - 1).all()
    if CATALOGUE[name].paths:
        tree = Taxonomy.from_paths(CATALOGUE[name].paths)
        assert data.taxonomy == tree, "the tree kept for the hub is that of the files"


def test_real_mnist_is_read(nestling_data: Path) -> None:
    data = load_data("mnist", "train", nestling_data)
    assert data.inputs.shape == (60_000, 1, 28, 28)
    assert has_split("grocery", "validation", nestling_data)
    assert len(load_data("caltech101", "all", nestling_data)) == 5_975
