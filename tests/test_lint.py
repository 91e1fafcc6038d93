"""``nestling lint``: each kind of fault is planted, found with its rows, and mended; the clean copy raises none."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nestling.data.sources import load_data
from nestling.lint import SEVERITY, lint
from nestling.lint.classes import pairs_alike
from nestling.lint.inputs import perceived
from running import nestling, refuse, succeed

TREE = {"setter": "dog", "husky": "dog", "tabby": "cat", "siamese": "cat"}
EACH = 6
"""Rows of each class and split."""
Row = dict[str, str]
Planted = tuple[set[int], dict[str, object]]
"""The rows that a finding must name, and the options of lint."""


def photograph(number: int, size: int = 24) -> Image.Image:
    """A picture like no other: coarse noise, enlarged."""
    coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC)


class Made:
    """A CSV of pictures with coarse and fine labels and a split, to plant faults into."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.csv, self.header = folder, folder / "labels.csv", ["path", "coarse", "fine", "split"]
        self.rows: list[Row] = []
        for split in ("train", "test"):
            for fine, coarse in TREE.items():
                for _ in range(EACH):
                    name = f"{len(self.rows)}.png"
                    photograph(len(self.rows)).save(folder / name)
                    self.rows.append({"path": name, "coarse": coarse, "fine": fine, "split": split})

    def write(self) -> Path:
        with self.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.header)
            writer.writeheader()
            writer.writerows(self.rows)
        return self.csv

    def taxonomy(self, text: str = "") -> dict[str, object]:
        edges = text or "".join(f"{coarse},{fine}\n" for fine, coarse in TREE.items())
        path = self.folder / "tree.csv"
        path.write_text("parent,child\n" + edges)
        return {"taxonomy": path, "levels": ["coarse", "fine"]}

    def add(self, **cells: str) -> int:
        self.rows.append({**self.rows[0], **cells})
        return len(self.rows) - 1


def two_parents(made: Made) -> Planted:
    made.rows[2]["coarse"] = made.rows[3]["coarse"] = "cat"
    return {2, 3}, {}


def cycle(made: Made) -> Planted:
    made.rows[7] |= {"coarse": "husky", "fine": "dog"}
    return {7}, {}


def cycle_of_file(made: Made) -> Planted:
    options = made.taxonomy("dog,husky\nhusky,setter\nsetter,dog\ncat,tabby\n")
    return {row for row, cells in enumerate(made.rows) if cells["coarse"] == "dog"}, {**options}


def contradicting_labels(made: Made) -> Planted:
    made.rows[4]["coarse"] = "cat"
    return {4}, {}


def contradicting_taxonomy(made: Made) -> Planted:
    for row in made.rows:
        if row["fine"] == "tabby":
            row["coarse"] = "dog"
    return {row for row, cells in enumerate(made.rows) if cells["fine"] == "tabby"}, made.taxonomy()


def unknown_class(made: Made) -> Planted:
    made.rows[9]["fine"] = "huskey"
    return {9}, made.taxonomy()


def missing_file(made: Made) -> Planted:
    made.rows[5]["path"], made.rows[8]["path"] = "gone.png", ""
    return {5, 8}, {}


def unreadable_file(made: Made) -> Planted:
    whole = (made.folder / "6.png").read_bytes()
    (made.folder / "6.png").write_bytes(whole[: len(whole) // 2])
    return {6}, {}


def duplicate_across_splits(made: Made) -> Planted:
    test = 4 * EACH
    (made.folder / f"{test}.png").write_bytes((made.folder / "0.png").read_bytes())
    return {0, test}, {}


def duplicate_contradicting(made: Made) -> Planted:
    # The same pixels in another format.
    Image.open(made.folder / "1.png").save(made.folder / "copy.bmp")
    return {1, made.add(path="copy.bmp", coarse="dog", fine="husky")}, {}


def same_row_twice(made: Made) -> Planted:
    return {0, made.add()}, {}


def similar_names(made: Made) -> Planted:
    for row in (2, 3, 4):
        made.rows[row]["fine"] = "Setter"
    return {2, 3, 4}, {}


def single_child(made: Made) -> Planted:
    rows = {row for row, cells in enumerate(made.rows) if cells["coarse"] == "cat"}
    for row in rows:
        made.rows[row]["fine"] = "tabby"
    return rows, {}


def tiny_class(made: Made) -> Planted:
    photograph(99).save(made.folder / "99.png")
    return {made.add(path="99.png", fine="poodle")}, {}


def empty_class(made: Made) -> Planted:
    edges = "".join(f"{coarse},{fine}\n" for fine, coarse in TREE.items())
    return set(), made.taxonomy(edges + "dog,poodle\n")


def only_tested(made: Made) -> Planted:
    rows = {4 * EACH + number for number in range(3)}
    for row in rows:
        made.rows[row]["fine"] = "poodle"
    return rows, {}


def ragged_labels(made: Made) -> Planted:
    made.rows[3]["coarse"] = ""
    return {3}, {}


def ragged_leaf(made: Made) -> Planted:
    rows = {row for row, cells in enumerate(made.rows) if cells["coarse"] == "cat"}
    for row in rows:
        made.rows[row]["fine"] = ""
    return rows, {}


def class_mix_drift(made: Made) -> Planted:
    # A third as many dogs in test as in training.
    made.rows = [row for row in made.rows for _ in range(20)]
    made.rows = [r for n, r in enumerate(made.rows) if r["split"] == "train" or r["coarse"] == "cat" or n % 3 == 0]
    return {row for row, cells in enumerate(made.rows) if cells["split"] == "test" and cells["coarse"] == "cat"}, {}


def near_duplicate(made: Made) -> Planted:
    Image.open(made.folder / "0.png").resize((48, 48), Image.Resampling.BICUBIC).save(made.folder / "n.jpg", quality=80)
    return {0, made.add(path="n.jpg")}, {}


PLANTS: list[tuple[str, Callable[[Made], Planted]]] = [
    ("two-parents", two_parents),
    ("cycle", cycle),
    ("cycle", cycle_of_file),
    ("contradicting-labels", contradicting_labels),
    ("contradicting-labels", contradicting_taxonomy),
    ("unknown-class", unknown_class),
    ("missing-file", missing_file),
    ("unreadable-file", unreadable_file),
    ("duplicate-across-splits", duplicate_across_splits),
    ("duplicate-contradicting", duplicate_contradicting),
    ("same-row-twice", same_row_twice),
    ("similar-names", similar_names),
    ("single-child", single_child),
    ("tiny-class", tiny_class),
    ("empty-class", empty_class),
    ("empty-class", only_tested),
    ("ragged-row", ragged_labels),
    ("ragged-row", ragged_leaf),
    ("class-mix-drift", class_mix_drift),
    ("near-duplicate", near_duplicate),
]


def test_every_kind_is_planted() -> None:
    assert {kind for kind, _ in PLANTS} == set(SEVERITY) and len(SEVERITY) == 16


@pytest.mark.parametrize("with_taxonomy", [False, True])
def test_the_clean_copy_raises_nothing(tmp_path: Path, with_taxonomy: bool) -> None:
    made = Made(tmp_path)
    report = lint(made.write(), **(made.taxonomy() if with_taxonomy else {}))  # type: ignore[arg-type]
    assert report.findings == ()
    assert [level.given_finer for level in report.levels] == [0.0, None]


@pytest.mark.parametrize(("kind", "plant"), PLANTS, ids=[f"{kind}-{plant.__name__}" for kind, plant in PLANTS])
def test_a_planted_fault_is_found_with_its_rows_and_mended(
    tmp_path: Path, kind: str, plant: Callable[[Made], Planted]
) -> None:
    made = Made(tmp_path)
    rows, options = plant(made)
    source = made.write()
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    report = lint(source, **options)  # type: ignore[arg-type]
    found = [finding for finding in report.findings if finding.kind == kind]
    assert {row for finding in found for row in finding.rows} == rows
    assert found and all(f.items and f.message and f.remedy and f.severity == SEVERITY[kind] for f in found)
    if plant is class_mix_drift or plant is cycle_of_file:
        return
    given = [f"--{name}={','.join(v) if isinstance(v, list) else v}" for name, v in options.items()]
    code = 3 if report.count("error") else 0
    out = tmp_path / "mended.csv"
    done = run_lint(code, source, "--fix", out, "--json", "-", *given)
    content = json.loads(done)
    assert (content["errors"], content["warnings"]) == (report.count("error"), report.count("warning"))
    assert kind in {finding["kind"] for finding in content["findings"]}
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path != out} == before
    again = lint(out, **options)  # type: ignore[arg-type]
    assert again.count("error") == 0
    assert load_data(out, levels=["coarse", "fine"])


def run_lint(code: int, *arguments: object) -> str:
    from running import nestling

    done = nestling("lint", *arguments)
    assert done.code == code, done.err
    return done.out


def test_lines_of_another_length_are_ragged(tmp_path: Path) -> None:
    made = Made(tmp_path)
    text = made.write().read_text().splitlines()
    text[3] += ",more"
    text[5] = "4.png,dog"
    made.csv.write_text("\n".join(text))
    report = lint(made.csv)
    assert {(finding.kind, finding.rows) for finding in report.findings} >= {("ragged-row", (2, 4))}


def test_a_tree_of_folders_is_mended_as_a_tree_of_folders(tmp_path: Path) -> None:
    """A damaged picture goes, names of one class become one, a picture in two splits stays in test alone."""
    source = tmp_path / "tree"
    for number, name in enumerate(["dog/husky"] * 5 + ["dog/Husky"] * 3 + ["dog/setter"] * 5 + ["cat/tabby"] * 5):
        for split in ("train", "test"):
            (source / split / name).mkdir(parents=True, exist_ok=True)
            photograph(2 * number + (split == "test")).save(source / split / name / f"{number}.png")
    (source / "train/dog/husky/0.png").write_bytes(b"no picture")
    (source / "test/cat/tabby/17.png").write_bytes((source / "train/cat/tabby/17.png").read_bytes())
    (source / "train/cat/empty").mkdir()
    kinds = {finding.kind: finding for finding in lint(source).findings}
    assert set(kinds) == {
        *("unreadable-file", "duplicate-across-splits", "similar-names", "empty-class", "single-child"),
    }
    assert kinds["empty-class"].items == ("train/cat/empty",)
    assert kinds["unreadable-file"].items == (str(source / "train/dog/husky/0.png"),)
    run_lint(3, source, "--fix", tmp_path / "out")
    mended = tmp_path / "out"
    assert lint(mended).count("error") == 0
    assert sorted(path.name for path in (mended / "train/dog").iterdir()) == ["husky", "setter"]
    assert sum(path.is_file() for path in (mended / "train").rglob("*")) == 16
    assert sum(path.is_file() for path in (mended / "test").rglob("*")) == 18


def test_a_set_of_parquet_is_mended_as_parquet(tmp_path: Path) -> None:
    """The copy holds the pictures themselves, bit by bit."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    source = tmp_path / "set"
    source.mkdir()
    for split, count in (("train", 24), ("test", 8)):
        pictures = []
        for number in range(count):
            buffer = io.BytesIO()
            photograph(number + 100 * (split == "test")).save(buffer, "PNG")
            pictures.append({"bytes": buffer.getvalue(), "path": None})
        names = [sorted(TREE)[number % 4] for number in range(count)]
        columns = {"image": pictures, "coarse": [TREE[name] for name in names], "fine": names}
        columns |= {
            "id": [f"{split}-{number}" for number in range(count)],
            "group": [number // 2 for number in range(count)],
        }
        if split == "train":
            columns["fine"][0] = "Husky"
        parquet.write_table(pyarrow.table(columns), source / f"{split}.parquet")
    (finding,) = (finding for finding in lint(source).findings if finding.kind != "tiny-class")
    assert (finding.kind, finding.rows) == ("similar-names", (0,))
    run_lint(0, source, "--fix", tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["test.parquet", "train.parquet"]
    mended, before = load_data(tmp_path / "out"), load_data(source)
    assert len(mended.taxonomy.classes["fine"]) == 4 and len(before.taxonomy.classes["fine"]) == 5
    assert (mended.images(np.arange(24)) == before.images(np.arange(24))).all()
    assert mended.items == before.items and mended.items[0] == "train-0"
    assert mended.groups is not None and (mended.groups == before.groups).all()
    # A column that is not named as a level goes along.
    run_lint(0, source, "--levels", "fine", "--fix", tmp_path / "fine")
    assert parquet.read_table(tmp_path / "fine" / "test.parquet")["coarse"].to_pylist() == columns["coarse"]
    assert load_data(tmp_path / "fine").taxonomy.levels == ("coarse", "fine")
    load_data(source).taxonomy.save(tmp_path / "tree.json")
    run_lint(0, source, "--taxonomy", tmp_path / "tree.json", "--levels", "fine", "--fix", tmp_path / "by-tree")
    names = parquet.read_table(tmp_path / "by-tree" / "test.parquet").column_names
    assert sorted(names) == ["coarse", "fine", "group", "id", "image"] and names.index("coarse") < names.index("fine")


def test_texts_have_duplicates_too(tmp_path: Path) -> None:
    rows = [f"words number {n},{'ab'[n % 2]}" for n in range(30)]
    rows += ["words number 4,a", "words number 7,a", "Words  Number 9,b", '"",a']
    path = tmp_path / "texts.csv"
    path.write_text("text,topic\n" + "\n".join(rows) + "\n")
    found = {finding.kind: finding.rows for finding in lint(path).findings}
    assert found == {
        "same-row-twice": (4, 30),
        "duplicate-contradicting": (7, 31),
        "near-duplicate": (9, 32),
        "missing-file": (33,),
    }


@pytest.mark.parametrize(
    ("one", "other", "alike"),
    [
        ("Golden retriever", "golden_retriever", True),
        ("café", "Cafe", True),
        ("golden retreiver", "golden retriever", True),
        ("pepper bells", "pepper bell", False),
        ("grapefruits", "grapefruit", True),
        ("mouse", "house", False),
        ("class10", "class11", False),
        ("type a", "type b", False),
    ],
)
def test_names_that_look_alike(one: str, other: str, alike: bool) -> None:
    assert bool(pairs_alike(["elephant", one, "lion", other])) == alike


def test_the_hash_is_of_what_a_picture_shows() -> None:
    """By hand: darker from left to right in every row is no bit set, lighter all of them."""
    ramp = np.tile(np.arange(0, 255, 3, dtype=np.uint8), (3, 40, 1))
    assert int(perceived(ramp)[0]) == 2**64 - 1
    assert int(perceived(ramp[:, :, ::-1])[0]) == 0
    code, thumb, colour = perceived(np.full((3, 20, 20), 7, np.uint8))
    assert int(code) == 0 and not thumb.any() and colour.tolist() == [7, 7, 7]


def test_what_lint_refuses(tmp_path: Path) -> None:
    made = Made(tmp_path)
    source = made.write()
    refuse(2, ["is there already"], "lint", source, "--fix", source)
    refuse(2, ["never touched"], "lint", tmp_path, "--fix", tmp_path / "inside")
    refuse(2, ["a folder or a .csv file"], "lint", source, "--fix", tmp_path / "x.parquet")
    refuse(2, ["unknown source"], "lint", "nowhere")
    (tmp_path / "bad.json").write_text("{")
    refuse(3, ["it is no JSON"], "lint", source, "--taxonomy", tmp_path / "bad.json")


def test_it_is_said_in_words(tmp_path: Path) -> None:
    made = Made(tmp_path)
    duplicate_across_splits(made)
    out = run_lint(3, made.write())
    assert "error duplicate-across-splits: rows 0, 24 (" in out and "mend: keep those in test alone" in out
    assert out.splitlines()[-1] == "48 rows: 1 errors, 0 warnings"


@pytest.mark.long
def test_the_digits_are_clean() -> None:
    assert succeed("lint", "digits").out.splitlines()[-1].endswith("rows: 0 errors, 0 warnings")


def test_a_spelling_is_mended_before_parents_are_compared(tmp_path: Path) -> None:
    """Of a coarse class in two spellings no fine label is forgotten."""
    made = Made(tmp_path)
    for row in made.rows[:3]:
        row["coarse"] = " dog "
    run_lint(3, made.write(), "--fix", tmp_path / "out.csv")
    with (tmp_path / "out.csv").open(newline="") as file:
        mended = list(csv.DictReader(file))
    assert [row["fine"] for row in mended] == [row["fine"] for row in made.rows]
    assert {row["coarse"] for row in mended} == {"dog", "cat"}


def test_columns_that_are_no_levels_are_put_in_doubt_before_the_rows(tmp_path: Path) -> None:
    made = Made(tmp_path)
    for number, row in enumerate(made.rows):
        row["remark"] = ("n/a", "good")[number % 2]
    made.header.append("remark")
    done = nestling("lint", made.write())
    assert done.code == 3 and "most classes of 'remark' stand under several of 'fine'" in done.out
    assert "with --levels a,b,c" in done.out
    assert nestling("lint", made.csv, "--levels", "coarse,fine").code == 0


def test_a_mend_says_which_labels_it_changes(tmp_path: Path) -> None:
    made = Made(tmp_path)
    made.rows[3]["coarse"] = "cat"
    done = nestling("lint", made.write(), "--fix", tmp_path / "mended.csv")
    changed = [line for line in done.err.splitlines() if line.startswith(str(tmp_path / "3.png"))]
    assert changed == [f"{tmp_path / '3.png'}: fine 'setter' is forgotten"]


def test_a_column_without_a_label_is_no_level_as_in_training(tmp_path: Path) -> None:
    made = Made(tmp_path)
    for row in made.rows:
        row["breed"] = ""
    made.header.append("breed")
    source = made.write()
    assert "empty in every row, so no level: 'breed'" in succeed("lint", source).out
    assert "no row is labelled at 'breed' yet" in succeed("lint", source, "--levels", "coarse,fine,breed").out
    refuse(3, ["level 'breed' has no classes"], "lint", source, "--levels", "coarse,breed,fine")
