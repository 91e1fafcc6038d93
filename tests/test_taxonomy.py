"""Taxonomies: where they come from, what they answer, and every way in which they are refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.errors import DataError, NestlingError, StorageError, UsageError
from nestling.taxonomy import Taxonomy
from nestling.tree import natural_key
from nestling.tree_files import MAX_BYTES

PETS = ("animal/dog/husky", "animal/dog/pug", "animal/cat/siamese", "plant/tree/oak")


@pytest.fixture
def pets() -> Taxonomy:
    return Taxonomy.from_paths(PETS)


@pytest.fixture
def ragged() -> Taxonomy:
    """Rock ends at the coarse level, fish at the middle one.

    coarse: animal 0, rock 1 · middle: dog 0, fish 1 · fine: husky 0, pug 1
    """
    return Taxonomy.from_paths(["animal/dog/husky", "animal/dog/pug", "animal/fish", "rock"])


def refused(error: type[NestlingError], *parts: str) -> pytest.RaisesExc:
    """The error must be one line that has every one of ``parts``: the offender and the remedy."""

    def has_all(raised: BaseException) -> bool:
        text = str(raised)
        missing = [part for part in parts if part not in text]
        assert not missing, f"{missing} not in {text!r}"
        return "\n" not in text

    return pytest.RaisesExc(error, check=has_all)


@st.composite
def taxonomies(draw: st.DrawFn) -> Taxonomy:
    """Ragged trees of one to four levels; names may be the same at two levels."""
    levels = draw(st.integers(1, 4))
    widths, parents = [draw(st.integers(1, 4))], [[-1]]
    parents[0] *= widths[0]
    for _ in range(levels - 1):
        parents.append(draw(st.lists(st.integers(0, widths[-1] - 1), min_size=1, max_size=6)))
        widths.append(len(parents[-1]))
    names = [f"level {i}" for i in range(levels)]
    classes = {name: [f"class {code}" for code in range(width)] for name, width in zip(names, widths)}
    return Taxonomy(names, classes, dict(zip(names, parents)))


@st.composite
def labelled(draw: st.DrawFn) -> tuple[Taxonomy, np.ndarray]:
    """A tree and the full labels of some of its nodes: any prefix of any path."""
    taxonomy = draw(taxonomies())
    rows = []
    for _ in range(draw(st.integers(0, 8))):
        i = draw(st.integers(0, len(taxonomy.levels) - 1))
        code = draw(st.integers(0, taxonomy.num_classes(i) - 1))
        row = [int(taxonomy.ancestor(j, of=i)[code]) for j in range(i + 1)]
        rows.append(row + [-1] * (len(taxonomy.levels) - i - 1))
    return taxonomy, np.array(rows, np.int64).reshape(len(rows), len(taxonomy.levels))


# From paths --------------------------------------------------------------------------------------------------------


def test_paths_span_a_tree(pets: Taxonomy) -> None:
    assert pets.levels == ("coarse", "middle", "fine")
    assert pets.classes["middle"] == ("cat", "dog", "tree")
    assert pets.classes["fine"] == ("siamese", "husky", "pug", "oak")
    assert pets.parent["coarse"].tolist() == [-1, -1]
    assert pets.parent["middle"].tolist() == [0, 0, 1]
    assert pets.parent["fine"].tolist() == [0, 1, 1, 2]
    assert all(pets.parent[level].dtype == np.int64 for level in pets.levels)
    assert pets == Taxonomy.from_paths([path.split("/") for path in reversed(PETS)])
    assert repr(pets) == "Taxonomy(coarse: 2, middle: 3, fine: 4)"


def test_levels_are_named_by_their_number() -> None:
    names = [Taxonomy.from_paths(["/".join("abcde"[:depth])]).levels for depth in (1, 2, 3, 4)]
    assert names == [
        ("level-1",),
        ("coarse", "fine"),
        ("coarse", "middle", "fine"),
        ("level-1", "level-2", "level-3", "level-4"),
    ]
    assert Taxonomy.from_paths(["a/b"], levels=["kind", "breed"]).levels == ("kind", "breed")


def test_classes_are_sorted_by_parent_then_naturally() -> None:
    taxonomy = Taxonomy.from_paths(["b/a1", "b/a0", "a/a10", "a/a2", "a/a", "a10/z", "a2/y"])
    assert taxonomy.classes["coarse"] == ("a", "a2", "a10", "b")
    assert taxonomy.classes["fine"] == ("a", "a2", "a10", "y", "z", "a0", "a1")


def test_natural_order_takes_any_digits() -> None:
    names = ["x", "x2", "x02", "x10", "x" + "9" * 5000, "2x", "", "x2y1", "x²", "٣"]
    assert sorted(names[:4], key=natural_key) == ["x", "x02", "x2", "x10"]
    assert len(sorted(names, key=natural_key)) == len(names)


def test_ragged_paths_may_end_in_empty_names(ragged: Taxonomy) -> None:
    rows = [("animal", "dog", "husky"), ("animal", "dog", "pug"), ("animal", "fish", None), ("rock", "", float("nan"))]
    assert Taxonomy.from_paths(rows) == ragged
    assert repr(ragged) == "Taxonomy(coarse: 2, middle: 2, fine: 2; leaves above fine: 2)"


def test_path_to_an_inner_node_makes_no_leaf() -> None:
    assert Taxonomy.from_paths([*PETS, "animal", "animal/dog"]) == Taxonomy.from_paths(PETS)


def test_one_name_at_two_levels_is_fine() -> None:
    taxonomy = Taxonomy.from_paths(["dog/dog", "dog/cat"])
    assert taxonomy.classes == {"coarse": ("dog",), "fine": ("cat", "dog")}
    assert taxonomy.encode(["dog/dog"]).tolist() == [[0, 1]]


@pytest.mark.parametrize(
    ("paths", "error", "parts"),
    [
        ([], DataError, ["no paths", "at least one class"]),
        (["a/b", "a//c"], DataError, ["path 1", "'a//c'", "empty name", "write every name"]),
        ([("a", None, "c")], DataError, ["path 0", "empty name"]),
        ([("a", "b"), ("", "")], DataError, ["path 1", "empty name"]),
        (["a/b", 3], DataError, ["path 1", "3", "give 'a/b/c'"]),
        ("a/b", DataError, ["'a/b'", "a list of paths"]),
        ([("a", b"b")], DataError, ["row 0", "'fine'", "b'b'", "give text"]),
        ([("a", "c"), ("a", ["b"])], DataError, ["row 1", "'fine'", "['b']", "give text"]),
        (["a/x", "b/x"], DataError, ["'x' has two parents", "'a' in row 0", "'b' in row 1", "--qualify-names"]),
        (["/".join("a" * 65)], DataError, ["65 levels", "at most 64"]),
        (["a/" + "x" * 2000], DataError, ["xxx…", "2000 characters", "at most 1000"]),
        (["a/\udcff"], DataError, ["'\\udcff'", "no valid Unicode", "rename"]),
    ],
)
def test_paths_refused(paths: object, error: type[NestlingError], parts: list[str]) -> None:
    with refused(error, *parts):
        Taxonomy.from_paths(paths)  # pyright: ignore[reportArgumentType]


def test_levels_that_do_not_fit_the_paths() -> None:
    with refused(UsageError, "3 levels, 2 are named", "'kind', 'breed'", "name every level"):
        Taxonomy.from_paths(PETS, levels=["kind", "breed"])
    with refused(DataError, "level 'd' has no classes", "leave it out"):
        Taxonomy.from_paths(PETS, levels=list("abcd"))
    with refused(DataError, "the level 'a' stands 2 times", "its own name"):
        Taxonomy.from_paths(PETS, levels=list("aab"))


# From tables -------------------------------------------------------------------------------------------------------

LEVELS = ("kind", "breed")
ROWS = [("dog", "husky"), ("dog", "pug"), ("cat", "siamese"), ("cat", None)]


class Frame:
    """What nestling knows of a pandas frame."""

    def to_dict(self, *, orient: str) -> list[dict[str, object]]:
        assert orient == "records"
        return [dict(zip(LEVELS, row)) for row in ROWS]


class Column(list[object]):
    """What nestling knows of an Arrow column."""

    def to_pylist(self) -> list[object]:
        return list(self)


class Table:
    """What nestling knows of an Arrow table."""

    def to_pylist(self) -> list[dict[str, object]]:
        return [{"id": 1, **dict(zip(LEVELS, row))} for row in ROWS]


@pytest.mark.parametrize(
    "table",
    [
        ROWS,
        iter(ROWS),
        [dict(zip(LEVELS, row)) for row in ROWS],
        [{"path": "x.png", **{k: v for k, v in zip(LEVELS, row) if v}} for row in ROWS],
        dict(zip(LEVELS, zip(*ROWS))),
        {"path": ["x.png"] * 4, "kind": np.array([row[0] for row in ROWS]), "breed": Column(row[1] for row in ROWS)},
        Frame(),
        Table(),
    ],
    ids=["sequences", "iterator", "mappings", "missing keys", "columns", "arrays", "to_dict", "to_pylist"],
)
def test_tables_of_every_kind(table: object) -> None:
    expected = Taxonomy.from_paths(["dog/husky", "dog/pug", "cat/siamese"], LEVELS)
    taxonomy = Taxonomy.from_table(table, LEVELS)
    assert taxonomy == expected
    assert not isinstance(table, list | dict) or taxonomy.encode(table).tolist() == [[1, 1], [1, 2], [0, 0], [0, -1]]


def test_arrow_itself() -> None:
    arrow = pytest.importorskip("pyarrow")
    table = arrow.table(dict(zip(LEVELS, zip(*ROWS))))
    taxonomy = Taxonomy.from_table(table, LEVELS)
    assert taxonomy.classes["breed"] == ("siamese", "husky", "pug")
    assert taxonomy.encode({name: table[name] for name in LEVELS}).tolist() == taxonomy.encode(table).tolist()


def test_numbers_are_names() -> None:
    rows = [(False, 3), (True, np.int64(10)), (False, np.float32(2)), (False, float("nan")), (False, 2.5)]
    taxonomy = Taxonomy.from_table(rows, LEVELS)
    assert taxonomy.classes == {"kind": ("False", "True"), "breed": ("2", "2.5", "3", "10")}
    assert taxonomy.encode([("False", "2"), (True, 10), (None, np.float64("nan"))]).tolist() == [
        [0, 0],
        [1, 3],
        [-1, -1],
    ]


def test_partial_labels_and_gaps() -> None:
    levels = ("coarse", "middle", "fine")
    rows = [
        ("", "dog", "husky"),  # where dog hangs is said below
        ("animal", "dog", ""),
        ("animal", "", "husky"),
        ("", "", "pug"),
        (None, "dog", "pug"),
        ("rock", None, None),
        (None, None, None),
    ]
    taxonomy = Taxonomy.from_table(rows, levels)
    assert taxonomy == Taxonomy.from_paths(["animal/dog/husky", "animal/dog/pug", "rock"])


def test_two_parents_name_the_rows_and_the_way_out() -> None:
    rows = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "y"), *[("a", "x")] * 4, ("c", "x")]
    with refused(
        DataError,
        "breed 'x' has two parents",
        "kind 'a' in rows 0, 4, 5 and 2 more",
        "'b' in row 2",
        "1 more parents",
        "so have 1 more classes, 'y'",
        "'a/x' and 'b/x'",
        "--qualify-names (qualify=True)",
    ):
        Taxonomy.from_table(rows, LEVELS)


def test_qualified_names_only_where_names_collide() -> None:
    rows = [("a", "x"), ("a", "y"), ("b", "x"), ("b", "z")]
    taxonomy = Taxonomy.from_table(rows, LEVELS, qualify=True)
    assert taxonomy.classes["breed"] == ("a/x", "y", "b/x", "z")
    assert taxonomy.parent["breed"].tolist() == [0, 0, 1, 1]
    assert taxonomy == Taxonomy.from_paths(rows, LEVELS, qualify=True)


def test_qualified_names_below_qualified_names() -> None:
    rows = [("a", "m", "x"), ("b", "m", "x"), ("b", "n", "x"), ("b", "n", "y")]
    levels = ("coarse", "middle", "fine")
    taxonomy = Taxonomy.from_table(rows, levels, qualify=True)
    assert taxonomy.classes["middle"] == ("a/m", "b/m", "n")
    assert taxonomy.classes["fine"] == ("a/m/x", "b/m/x", "b/n/x", "y")
    assert taxonomy.encode(rows).tolist() == [[0, 0, 0], [1, 1, 1], [1, 2, 2], [1, 2, 3]]
    plain = [(None, "b/m", "x"), ("a", None, "x"), (None, "n", "x"), (None, None, "b/n/x"), ("b", "m", None)]
    assert taxonomy.encode(plain).tolist() == [[-1, 1, 1], [0, -1, 0], [-1, 2, 2], [-1, -1, 2], [1, 1, -1]]
    with refused(DataError, "row 1: fine 'x' may be 'b/m/x' or 'b/n/x'", "label a coarser level"):
        taxonomy.encode([("a", "m", "x"), ("b", None, "x")])
    with refused(DataError, "row 0: middle 'm' may be 'a/m' or 'b/m'", "write one of these"):
        taxonomy.encode([(None, "m", "x")])
    three = Taxonomy.from_table([*rows, ("c", "o", "z")], levels, qualify=True)
    with refused(DataError, "row 0: fine 'x' is 'a/m/x' or 'b/m/x' or 'b/n/x'", "coarse 'c'", "correct one"):
        three.encode([("c", None, "x")])


def test_qualified_gap_rows() -> None:
    levels = ("coarse", "middle", "fine")
    rows = [("a", "m", "x"), ("b", "m", "x"), ("b", None, "x"), (None, "m", "x")]
    assert Taxonomy.from_table(rows, levels, qualify=True).classes["fine"] == ("a/m/x", "b/m/x")
    with refused(DataError, "row 2: fine 'w' has no parent", "middle", "fill it in"):
        Taxonomy.from_table([*rows[:2], (None, "m", "w")], levels, qualify=True)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([("", "", "x"), ("a", "m", "y")], ["row 0: fine 'x' has no parent", "no row gives its middle", "fill it in"]),
        ([("a", "m", "x"), ("b", "", "x")], ["row 1: fine 'x' is under 'a/m' elsewhere", "correct"]),
        ([{"coarse": "a", "midle": "m", "fine": "x"}], ["unknown column middle", "'midle'", "Did you mean 'midle'?"]),
        ({"coarse": ["a"], "middle": ["m"]}, ["unknown column fine", "'coarse', 'middle'"]),
        ({"coarse": ["a"], "middle": ["m"], "fine": []}, ["differ in length", "one cell per row"]),
        ({"coarse": "a", "middle": "m", "fine": "x"}, ["column 'coarse' is 'a'", "a row goes in a list"]),
        ([("a", "m", "x", "y")], ["row 0 has 4 labels", "3 levels", "one label per level"]),
        ([("a", "m", "x"), 7], ["row 1 is 7", "give a mapping or a sequence"]),
        (7, ["got int", "give mappings"]),
        ("rows", ["'rows'", "a list of rows"]),
        ([], ["level 'coarse' has no classes", "leave it out"]),
        ([("a", "m", None)], ["level 'fine' has no classes", "label rows with it"]),
    ],
)
def test_tables_refused(rows: object, parts: list[str]) -> None:
    with refused(DataError, *parts):
        Taxonomy.from_table(rows, ("coarse", "middle", "fine"))


# From folders ------------------------------------------------------------------------------------------------------


def touch(root: Path, *files: str) -> None:
    for file in files:
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_bytes(b"")


def test_folders(tmp_path: Path) -> None:
    touch(tmp_path, "readme.txt", "a/x/1.png", "a/2.png", "b/x/3.png", "b/y/4.png", "c/5.png", ".git/z/6", "d/.hidden")
    (tmp_path / "empty" / "folder").mkdir(parents=True)
    taxonomy = Taxonomy.from_folder(tmp_path)
    assert taxonomy.classes == {"coarse": ("a", "b", "c"), "fine": ("a/x", "b/x", "y")}
    assert taxonomy.leaves == (("fine", 0), ("fine", 1), ("fine", 2), ("coarse", 2))
    assert taxonomy.encode(["a/x", "a", "b/x", "c"]).tolist() == [[0, 0], [0, -1], [1, 1], [2, -1]]
    assert Taxonomy.from_folder(str(tmp_path), levels=["kind", "breed"]).levels == ("kind", "breed")


def test_folders_refused(tmp_path: Path) -> None:
    with refused(StorageError, "cannot read folder", "missing", "check the path"):
        Taxonomy.from_folder(tmp_path / "missing")
    touch(tmp_path, "1.png")
    with refused(DataError, str(tmp_path), "no class folders", "its own folder"):
        Taxonomy.from_folder(tmp_path)
    touch(tmp_path, "a/b/2.png")
    (tmp_path / "a" / "b" / "up").symlink_to(tmp_path / "a", target_is_directory=True)
    with refused(DataError, "up is a cycle", "remove the link"):
        Taxonomy.from_folder(tmp_path)


# Files -------------------------------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path, ragged: Taxonomy) -> None:
    path = tmp_path / "taxonomy.json"
    ragged.save(path)
    assert Taxonomy.load(path) == ragged
    assert (
        json.loads(path.read_text())
        == ragged.to_dict()
        == {
            "levels": ["coarse", "middle", "fine"],
            "classes": {"coarse": ["animal", "rock"], "middle": ["dog", "fish"], "fine": ["husky", "pug"]},
            "parent": {"coarse": [-1, -1], "middle": [0, 0], "fine": [0, 0]},
        }
    )
    assert Taxonomy.load(str(path), levels=ragged.levels) == ragged
    with refused(UsageError, "names its levels", "leave them out"):
        Taxonomy.load(path, levels=["a", "b", "c"])
    with refused(StorageError, "cannot"):
        ragged.save(path / "below a file")


def test_json_keeps_its_order(tmp_path: Path) -> None:
    content = {"levels": ["kind"], "classes": {"kind": ["ü b", "a"]}, "parent": {}}
    (tmp_path / "t.json").write_text("\ufeff" + json.dumps(content, ensure_ascii=False), encoding="utf-8")
    taxonomy = Taxonomy.load(tmp_path / "t.json")
    assert taxonomy.classes["kind"] == ("ü b", "a")
    assert taxonomy.parent["kind"].tolist() == [-1, -1]


GOOD = {"levels": ["a", "b"], "classes": {"a": ["x", "y"], "b": ["u", "v"]}, "parent": {"a": [-1, -1], "b": [0, 1]}}


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ({"levels": []}, ["level"]),
        ({"levels": "ab"}, ["'levels'", "list of names", "'ab'"]),
        ({"levels": [1, 2]}, ["'levels'", "list of names"]),
        ({"levels": ["a", ""]}, ["a level is named ''", "not empty"]),
        ({"levels": ["a", "a"]}, ["level 'a' stands 2 times"]),
        ({"levels": ["a", "b", "c"]}, ["'classes'", "lacks the level 'c'", "one list for every level"]),
        ({"levels": ["a"]}, ["unknown level in 'classes'", "b", "expected one of 'a'"]),
        ({"extra": 1}, ["unknown key of a taxonomy extra", "'parent'"]),
        ({"classes": ["x"]}, ["'classes'", "one list per level", "['x']"]),
        ({"classes": {"a": "xy", "b": ["u", "v"]}}, ["'classes' of level 'a' must be a list", "'xy'"]),
        ({"classes": {"a": ["x", "y"], "b": []}}, ["level 'b' has no classes", "leave it out"]),
        ({"classes": {"a": ["x", "y"], "b": ["u", " "]}}, ["class at level 'b' is named ' '", "not empty"]),
        ({"classes": {"a": ["x", "y"], "b": ["u", None]}}, ["class at level 'b' is named None", "text"]),
        ({"classes": {"a": ["x", "y"], "b": ["u", "u"]}}, ["the class at level 'b' 'u' stands 2 times", "own name"]),
        ({"classes": {"a": ["x", "y"], "b": ["u"]}}, ["level 'b' has 1 classes but 2 parents", "one per class"]),
        ({"parent": {"a": [-1, -1], "b": [0, 2]}}, ["the parent of b 'v' is 2", "expected 0 to 1"]),
        ({"parent": {"a": [-1, -1], "b": [-1, 0]}}, ["the parent of b 'u' is -1", "expected 0 to 1"]),
        ({"parent": {"a": [-1, 0], "b": [0, 1]}}, ["the parent of a 'y' is 0", "−1 at the coarsest"]),
        ({"parent": {"a": [-1, -1], "b": [0, 1.5]}}, ["parents of level 'b'", "list of integers"]),
        ({"parent": {"a": [-1, -1], "b": [0, [1]]}}, ["parents of level 'b'", "list of integers"]),
        ({"parent": {"a": [-1, -1], "b": [0, 10**30]}}, ["parents of level 'b'", "list of integers"]),
        ({"parent": {"a": [-1, -1], "b": [0, "x"]}}, ["parents of level 'b'", "list of integers"]),
        ({"parent": {"a": [-1, -1]}}, ["'parent'", "lacks the level 'b'"]),
        ({"parent": None}, ["'parent'", "one list per level", "None"]),
    ],
)
def test_json_refused(tmp_path: Path, change: dict[str, object], parts: list[str]) -> None:
    Taxonomy.from_dict(GOOD)
    path = tmp_path / "t.json"
    path.write_text(json.dumps(GOOD | change))
    with refused(DataError, str(path), *parts):
        Taxonomy.load(path)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ["no JSON", "CSV"]),
        (b"[1]", ["got list", '"levels"']),
        (b'{"levels": ["a"]}', ["needs the key 'classes'"]),
        (b'{"levels": ["a"], "levels": ["b"]}', ["'levels' stands twice", "keep one"]),
        (b"\xff\xfe{}", ["no UTF-8", "byte 0", "save it as UTF-8"]),
        (b"[" * 100_000, ["no JSON"]),
    ],
)
def test_damaged_json(tmp_path: Path, content: bytes, parts: list[str]) -> None:
    path = tmp_path / "t.json"
    path.write_bytes(content)
    with refused(DataError, str(path), *parts):
        Taxonomy.load(path)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with refused(StorageError, "missing.json", "check the path"):
        Taxonomy.load(tmp_path / "missing.json")
    with refused(StorageError, str(tmp_path), "check the path"):
        Taxonomy.load(tmp_path)
    with (tmp_path / "large.csv").open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    with refused(DataError, "large.csv", "larger than 64 MB", "classes only"):
        Taxonomy.load(tmp_path / "large.csv")


@given(st.binary(max_size=200) | st.text(alphabet='ab,\n"/ ', max_size=40).map(str.encode))
def test_bytes_of_any_kind_are_refused_by_our_own_errors(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    messages = []
    for name in ("t.csv", "t.json"):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(data)
        try:
            Taxonomy.load(path)
        except DataError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)


@pytest.mark.parametrize(
    "text",
    [
        "parent,child\nanimal,dog\ndog,husky\ndog,pug\nanimal,fish\n,rock\n",
        "dog,pug\r\ndog,husky\r\n\r\nanimal,fish\r\n,rock\r\nanimal,dog\r\nanimal,dog\r\n",
        '\ufeffParent , Child\n,animal\n"animal","dog"\ndog, husky\ndog,pug\nanimal,fish\n,rock',
    ],
    ids=["header", "no header", "quotes"],
)
def test_edges(tmp_path: Path, text: str, ragged: Taxonomy) -> None:
    path = tmp_path / "edges.csv"
    path.write_bytes(text.encode())
    assert Taxonomy.load(path) == ragged
    assert Taxonomy.load(path, levels=["kind", "family", "breed"]).levels == ("kind", "family", "breed")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("parent,child\na,x\nb,x\n", ["'x' has two parents", "'a' on line 2", "'b' on line 3", "delete one"]),
        (",x\na,x\n", ["'x' has two parents", "a root on line 1", "'a' on line 2"]),
        ("a,b\nb,c\nc,a\n", ["cycle", "'a' -> 'b' -> 'c' -> 'a'", "delete one"]),
        ("r,s\na,a\n", ["cycle: 'a' -> 'a'", "line 2"]),
        ("x,b\nc,d\nd,c\n", ["cycle: 'c' -> 'd' -> 'c'", "line 2"]),
        ("\n".join(f"{i},{(i + 1) % 99}" for i in range(99)), ["'0' -> '1' -> ", "'5' -> … -> '95'", "-> '98' -> '0'"]),
        ("a,b\nb,a\n", ["cycle", "'a' -> 'b' -> 'a'"]),
        ("a,b\na\n", ["line 2, 'a', is no edge", "parent,child"]),
        ("a,b,c\n", ["line 1, 'a,b,c', is no edge"]),
        ("a,\n", ["line 1, 'a,', is no edge"]),
        ('a,"b\n', ["no CSV", "parent,child"]),
        ("", ["no edges", "one line parent,child"]),
        ("parent,child\n", ["no edges"]),
        ("\n".join(f"{i},{i + 1}" for i in range(100)), ["deeper than 64 levels"]),
    ],
)
def test_edges_refused(tmp_path: Path, text: str, parts: list[str]) -> None:
    path = tmp_path / "edges.csv"
    path.write_text(text)
    with refused(DataError, str(path), *parts):
        Taxonomy.load(path)


# Levels and columns ------------------------------------------------------------------------------------------------


def test_levels_by_name_and_number(pets: Taxonomy) -> None:
    assert [pets.level_index(level) for level in ("coarse", "fine", 1)] == [0, 2, 1]
    assert pets.level_index(np.int64(2)) == 2  # pyright: ignore[reportArgumentType]
    with refused(UsageError, "unknown level midle", "Did you mean 'middle'?"):
        pets.level_index("midle")
    for level in (3, -1, None):
        with refused(UsageError, f"unknown level {level}", "'coarse', 'middle', 'fine'"):
            pets.level_index(level)  # pyright: ignore[reportArgumentType]


def test_columns_of_a_ragged_tree(ragged: Taxonomy) -> None:
    assert [ragged.num_classes(level) for level in ragged.levels] == [2, 2, 2]
    assert [ragged.width(level) for level in ragged.levels] == [2, 3, 4]
    assert ragged.leaves == (("fine", 0), ("fine", 1), ("coarse", 1), ("middle", 1))
    assert ragged.column_names("fine") == ("husky", "pug", "rock", "fish")
    assert ragged.column_names("middle") == ("dog", "fish", "rock")
    assert ragged.column_parent("coarse").tolist() == [-1, -1]
    assert ragged.column_parent("middle").tolist() == [0, 0, 1]
    assert ragged.column_parent("fine").tolist() == [0, 0, 2, 1]
    assert ragged.ancestor("coarse", of="fine").tolist() == [0, 0, 1, 0]
    assert ragged.ancestor("fine", of="fine").tolist() == [0, 1, 2, 3]
    with refused(UsageError, "'fine' is finer than 'coarse'", "coarser or equal"):
        ragged.ancestor("fine", of="coarse")


def test_children(ragged: Taxonomy) -> None:
    assert ragged.children("coarse", 0).tolist() == [0, 1]
    assert ragged.children("coarse", 1).tolist() == ragged.children("fine", 0).tolist() == []
    with refused(DataError, "code 2", "'coarse'", "0 to 1"):
        ragged.children("coarse", 2)


def test_one_class_is_fine() -> None:
    taxonomy = Taxonomy.from_paths(["only"])
    assert taxonomy.distance(0).tolist() == [[0]]
    assert taxonomy.aggregate([[1.0]], 0).tolist() == [[1.0]]
    assert taxonomy.leaves == (("level-1", 0),)
    assert taxonomy.encode([["only"], [""]]).tolist() == [[0], [-1]]


# Labels ------------------------------------------------------------------------------------------------------------


def test_encode_takes_rows_of_every_kind(pets: Taxonomy) -> None:
    expected = [[0, 1, 1], [-1, 0, -1], [-1, -1, -1]]
    rows = [("animal", "dog", "husky"), (None, "cat", ""), (float("nan"), np.nan, None)]
    assert pets.encode(rows).tolist() == expected
    assert pets.encode([dict(zip(pets.levels, row)) for row in rows]).tolist() == expected
    assert pets.encode(dict(zip(pets.levels, zip(*rows)))).tolist() == expected
    assert pets.encode([np.array(["animal", "dog", "husky"]), ["", "cat"], []]).tolist() == expected
    assert pets.encode(["animal/dog/husky", "/cat", ""]).tolist() == expected
    assert pets.encode([{"fine": "husky", "path": "1.png"}, {"fine": None}]).tolist() == [[-1, -1, 1], [-1, -1, -1]]
    labels = pets.encode([])
    assert labels.shape == (0, 3)
    assert labels.dtype == np.int64
    labels = pets.encode(rows)
    labels[0] = -1  # not the taxonomy's own


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([("animal",), ("animal", "dog", "huskyy")], ["level 'fine' (row 1)", "huskyy", "Did you mean 'husky'?"]),
        ([("dog",)], ["level 'coarse' (row 0)", "dog", "'animal', 'plant'"]),
        ([{"fin": "husky"}], ["unknown column coarse", "'fin'"]),
        ([("animal", "dog", "husky", "x")], ["row 0 has 4 labels"]),
        ([("animal", "dog", {})], ["row 0, level 'fine'", "{}", "give text"]),
        ([("plant", "dog", "")], ["row 0: middle 'dog' is a 'animal', but coarse says 'plant'", "correct"]),
        ([("plant", "", "pug")], ["row 0: fine 'pug' is a 'animal', but coarse says 'plant'", "correct"]),
    ],
)
def test_encode_refuses(pets: Taxonomy, rows: object, parts: list[str]) -> None:
    with refused(DataError, *parts):
        pets.encode(rows)


def test_contradictions_name_their_rows(pets: Taxonomy) -> None:
    rows = [["animal", "dog", "pug"]] * 30
    rows[3] = rows[17] = ["animal", "cat", "husky"]
    rows[20] = ["plant", "dog", "pug"]
    with refused(
        DataError,
        "rows 3, 17: fine 'husky' is a 'dog', but middle says 'cat'",
        "and 1 more contradictions",
        "correct these labels, or the taxonomy",
    ):
        pets.encode(rows)


def test_complete_fills_coarser_levels(pets: Taxonomy) -> None:
    labels = [[-1, -1, 3], [-1, 1, -1], [0, -1, 2], [-1, -1, -1], [1, -1, -1]]
    expected = [[1, 2, 3], [0, 1, -1], [0, 1, 2], [-1, -1, -1], [1, -1, -1]]
    given = np.array(labels)
    assert pets.complete(given).tolist() == expected
    assert given.tolist() == labels
    assert pets.complete(given.astype(np.int8)).dtype == np.int64
    assert pets.complete([]).shape == pets.complete(np.empty((0, 3))).shape == (0, 3)


@pytest.mark.parametrize(
    ("labels", "parts"),
    [
        ([[0, 0, 0], [1, -1, 0]], ["row 1: fine 'siamese' is a 'animal', but coarse says 'plant'"]),
        ([[0, 0, 0], [0, 3, -1], [0, 9, -1]], ["rows 1, 2: 3 is no code at level 'middle'", "0 to 2", "−1"]),
        ([[0, 0, -2]], ["row 0: -2 is no code at level 'fine'", "0 to 3"]),
        (np.array([[0, 0, 255]], np.uint8), ["row 0: 255", "'fine'"]),
        ([[0, 0]], ["shape (1, 2)", "(n, 3)"]),
        ([0, 0, 0], ["shape (3,)", "(n, 3)"]),
        ([[0.0, 0.0, 0.0]], ["float64", "integers"]),
        ([[0, 0, 0], [0]], ["integers of shape (n, 3)"]),
    ],
)
def test_labels_refused(pets: Taxonomy, labels: object, parts: list[str]) -> None:
    for method in (pets.complete, pets.columns):
        with refused(DataError, *parts):
            method(labels)  # pyright: ignore[reportArgumentType]


def test_columns_carry_ragged_leaves_down(ragged: Taxonomy) -> None:
    rows = [("animal", "dog", "pug"), ("animal", "fish"), ("rock",), ("animal",), ("", "fish"), ()]
    expected = [[0, 0, 1], [0, 1, 3], [1, 2, 2], [0, -1, -1], [0, 1, 3], [-1, -1, -1]]
    assert ragged.columns(ragged.encode(rows)).tolist() == expected


@given(labelled())
def test_completing_and_columns(case: tuple[Taxonomy, np.ndarray]) -> None:
    taxonomy, labels = case
    finest = len(taxonomy.levels) - 1 - np.argmax((labels >= 0)[:, ::-1], axis=1)
    bare = np.full_like(labels, -1)
    bare[np.arange(len(labels)), finest] = labels[np.arange(len(labels)), finest]
    assert taxonomy.complete(bare).tolist() == labels.tolist()
    columns = taxonomy.columns(bare)
    leaf = [(taxonomy.levels[i], int(labels[row, i])) in taxonomy.leaves for row, i in enumerate(finest)]
    assert (columns[:, -1] >= 0).tolist() == leaf
    for i in range(len(taxonomy.levels)):
        own = columns[:, i] < taxonomy.num_classes(i)
        assert np.where(own, columns[:, i], -1).tolist() == labels[:, i].tolist()
        known = columns[:, i] >= 0
        if i:
            assert (taxonomy.column_parent(i)[columns[known, i]] == columns[known, i - 1]).all()
    for row, column in enumerate(columns[:, -1].tolist()):
        if column >= 0:
            assert taxonomy.leaves[column] == (taxonomy.levels[finest[row]], labels[row, finest[row]])


@given(labelled())
def test_names_and_codes_go_round(case: tuple[Taxonomy, np.ndarray]) -> None:
    taxonomy, labels = case
    names = [
        [taxonomy.classes[level][code] if code >= 0 else None for level, code in zip(taxonomy.levels, row)]
        for row in labels.tolist()
    ]
    assert taxonomy.encode(names).tolist() == labels.tolist()


# Probabilities and distances ---------------------------------------------------------------------------------------


def test_aggregate_sums_the_descendants(ragged: Taxonomy) -> None:
    p = np.array([[0.1, 0.2, 0.3, 0.4]], np.float32)  # husky, pug, rock, fish
    np.testing.assert_allclose(ragged.aggregate(p, "fine"), p)
    np.testing.assert_allclose(ragged.aggregate(p, "middle"), [[0.3, 0.4, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(ragged.aggregate(p, "coarse"), [[0.7, 0.3]], rtol=1e-6)
    np.testing.assert_allclose(ragged.aggregate([[0.3, 0.4, 0.3]], "coarse", of="middle"), [[0.7, 0.3]])
    assert ragged.aggregate(p, "coarse").dtype == np.float32
    assert ragged.aggregate(np.empty((0, 4)), "coarse").shape == (0, 2)
    with refused(UsageError, "(1, 3)", "'fine'", "4 columns", "of="):
        ragged.aggregate([[0.3, 0.4, 0.3]], "coarse")
    with refused(UsageError, "'fine' is finer than 'middle'"):
        ragged.aggregate([[0.3, 0.4, 0.3]], "fine", of="middle")


@given(taxonomies(), st.integers(0, 2**32 - 1))
def test_aggregated_probabilities_sum_to_one(taxonomy: Taxonomy, seed: int) -> None:
    p = np.random.default_rng(seed).dirichlet(np.ones(taxonomy.width(taxonomy.levels[-1])), size=3)
    for i, level in enumerate(taxonomy.levels):
        summed = taxonomy.aggregate(p, level)
        assert summed.shape == (3, taxonomy.width(level))
        np.testing.assert_allclose(summed.sum(axis=1), 1)
        naive = np.zeros_like(summed)
        for column, above in enumerate(taxonomy.ancestor(level, of=taxonomy.levels[-1])):
            naive[:, above] += p[:, column]
        np.testing.assert_allclose(summed, naive)
        for finer in taxonomy.levels[i:]:
            np.testing.assert_allclose(taxonomy.aggregate(taxonomy.aggregate(p, finer), level, of=finer), summed)


def test_distances_by_hand(ragged: Taxonomy) -> None:
    # husky and pug are siblings; rock hangs on the root, as animal does; fish is a sibling of dog.
    assert ragged.distance("fine").tolist() == [
        [0, 2, 4, 3],
        [2, 0, 4, 3],
        [4, 4, 0, 3],
        [3, 3, 3, 0],
    ]
    assert ragged.distance("middle").tolist() == [[0, 2, 3], [2, 0, 3], [3, 3, 0]]
    assert ragged.distance("coarse").tolist() == [[0, 2], [2, 0]]
    assert ragged.distance("fine").dtype == np.int64


@given(taxonomies())
def test_distances_count_edges(taxonomy: Taxonomy) -> None:
    leaf_level = {level: i for i, level in enumerate(taxonomy.levels)}
    for i, level in enumerate(taxonomy.levels):
        own = [(i, code) for code in range(taxonomy.num_classes(i))]
        nodes = own + [(leaf_level[name], code) for name, code in taxonomy.leaves if leaf_level[name] < i]
        paths = [[(j, int(taxonomy.ancestor(j, of=k)[code])) for j in range(k + 1)] for k, code in nodes]
        naive = [[len(set(one) ^ set(two)) for two in paths] for one in paths]
        assert taxonomy.distance(level).tolist() == naive


# Equality and immutability -----------------------------------------------------------------------------------------


@given(taxonomies())
def test_copies_are_equal(taxonomy: Taxonomy) -> None:
    for other in (
        Taxonomy.from_dict(json.loads(json.dumps(taxonomy.to_dict()))),
        copy.deepcopy(taxonomy),
        pickle.loads(pickle.dumps(taxonomy)),
    ):
        assert other == taxonomy
        assert hash(other) == hash(taxonomy)


def test_differences_are_seen(pets: Taxonomy, ragged: Taxonomy) -> None:
    assert pets != ragged
    assert pets != "pets"
    assert Taxonomy.from_dict(GOOD) != Taxonomy.from_dict(GOOD | {"parent": {"a": [-1, -1], "b": [1, 1]}})
    assert len({pets, Taxonomy.from_paths(PETS), ragged}) == 2


def test_nothing_can_be_changed(ragged: Taxonomy) -> None:
    arrays = [
        ragged.parent["fine"],
        ragged.column_parent("fine"),
        ragged.ancestor("coarse", of="fine"),
        ragged.ancestor("fine", of="fine"),
        ragged.distance("fine"),
    ]
    for array in arrays:
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 0
    with pytest.raises(AttributeError):
        ragged.levels = ()  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(TypeError):
        ragged.classes["fine"] = ()  # pyright: ignore[reportIndexIssue]
    given = np.array([0, 1])
    taxonomy = Taxonomy(["a", "b"], {"a": ["x", "y"], "b": ["u", "v"]}, {"a": [-1, -1], "b": given})
    given[0] = 1
    assert taxonomy.parent["b"].tolist() == [0, 1]


# The audit ---------------------------------------------------------------------------------------------------------


def test_entropies_by_hand() -> None:
    taxonomy = Taxonomy.from_paths(["a/x", "a/y", "b/z"])
    # Four rows x, two y, two z: H(coarse) = H(3/4, 1/4), H(fine) = 1.5 bits, H(fine | coarse) = 3/4 · H(2/3, 1/3).
    labels = np.array([[0, 0]] * 4 + [[0, 1]] * 2 + [[1, 2]] * 2 + [[1, -1], [-1, 2], [-1, -1]])
    audit = taxonomy.audit(labels)
    coarse, fine = audit.levels
    assert (coarse.level, coarse.num_rows, fine.level, fine.num_rows) == ("coarse", 9, "fine", 9)
    # The coarsest entropy counts the row that is known to it alone, too: six of nine.
    assert coarse.entropy == pytest.approx(np.log(3) - 2 / 3 * np.log(2))
    assert coarse.given_finer == 0
    assert coarse.given_coarser is None
    assert fine.entropy == pytest.approx(1.5 * np.log(2))
    assert fine.given_coarser == pytest.approx(0.75 * (np.log(3) - 2 / 3 * np.log(2)))
    assert fine.given_finer is None
    assert audit.nested
    assert audit.strictly_nested
    assert audit.breaking_rows == ()
    assert "strictly nested" in str(audit)


def test_rows_that_break_nesting() -> None:
    taxonomy = Taxonomy.from_paths(["a/x", "a/y", "b/z"])
    labels = np.array([[0, 0], [0, 0], [0, 0], [1, 0], [1, 2], [1, 2]])
    audit = taxonomy.audit(labels)
    # Of the four rows x, one says b: H(coarse | fine) = 4/6 · H(3/4, 1/4).
    assert audit.levels[0].given_finer == pytest.approx(4 / 6 * (2 * np.log(2) - 0.75 * np.log(3)))
    assert not audit.nested
    assert not audit.strictly_nested
    assert audit.breaking_rows == (3,)
    assert audit.findings == ("row 3: fine 'x' is a 'a', but coarse says 'b'",)
    assert "not nested; nesting is broken in row 3:\n  row 3: fine 'x'" in str(audit)


def test_class_that_is_always_wrong_breaks_nesting_too() -> None:
    audit = Taxonomy.from_paths(["a/x", "a/y", "b/z"]).audit([[1, 0], [1, 0], [0, 1]])
    assert audit.nested
    assert audit.breaking_rows == (0, 1)


def test_each_level_is_held_against_the_next_known_one(pets: Taxonomy) -> None:
    labels = [[1, 1, 1], [1, -1, 1], [0, 0, 1], [0, 1, 1]]
    found = [(c.rows.tolist(), c.level, c.coarser, c.given, c.expected) for c in pets.contradictions(labels)]
    assert found == [([2], 2, 1, 0, 1), ([1], 2, 0, 1, 0), ([0], 1, 0, 1, 0)]
    assert pets.audit(labels).breaking_rows == (0, 1, 2)


def test_nested_but_not_strictly() -> None:
    one_coarse = Taxonomy.from_paths(["a/x", "a/y"]).audit([[0, 0], [0, 1]])
    assert one_coarse.nested
    assert not one_coarse.strictly_nested
    assert "nested, not strictly" in str(one_coarse)
    never_together = Taxonomy.from_paths(["a/x", "b/y"]).audit([[0, -1], [-1, 1]])
    assert never_together.nested
    assert not never_together.strictly_nested
    assert np.isnan(never_together.levels[1].entropy)
    assert "nan" in str(never_together)
    assert Taxonomy.from_paths(["a/x"]).audit([]).nested


def test_independent_levels_gain_nothing() -> None:
    taxonomy = Taxonomy.from_paths(["a/x", "b/y", "b/z"])
    coarse, fine = np.repeat([0, 0, 1], 3), np.tile([0, 1, 2], 3)
    level = taxonomy.audit(np.stack([coarse, fine], axis=1)).levels[1]
    assert level.given_coarser == level.entropy


@given(labelled())
def test_labels_of_the_tree_are_nested(case: tuple[Taxonomy, np.ndarray]) -> None:
    taxonomy, labels = case
    audit = taxonomy.audit(labels)
    assert audit.nested
    assert audit.breaking_rows == ()
    assert all(level.given_finer in (None, 0) or np.isnan(level.given_finer) for level in audit.levels)


@given(taxonomies(), st.integers(0, 2**32 - 1))
def test_what_is_not_nested_has_a_breaking_row(taxonomy: Taxonomy, seed: int) -> None:
    generator = np.random.default_rng(seed)
    labels = np.stack([generator.integers(-1, taxonomy.num_classes(level), 12) for level in taxonomy.levels], axis=1)
    audit = taxonomy.audit(labels)
    good = np.delete(labels, audit.breaking_rows, axis=0)
    assert taxonomy.contradictions(good) == []
    assert audit.nested or audit.breaking_rows
    assert taxonomy.audit(good).nested


# Size --------------------------------------------------------------------------------------------------------------


def test_large_trees_and_tables() -> None:
    taxonomy = Taxonomy.from_paths([(f"a{i % 10}", f"b{i % 200}", f"c{i}") for i in range(10_000)])
    assert taxonomy.width("fine") == len(taxonomy.leaves) == 10_000
    codes = np.random.default_rng(0).integers(0, 10_000, 60_000).tolist()
    rows = [{"coarse": f"a{i % 10}", "middle": f"b{i % 200}", "fine": f"c{i}"} for i in codes]
    labels = taxonomy.encode(rows)
    assert taxonomy.complete(np.where([False, False, True], labels, -1)).tolist() == labels.tolist()
