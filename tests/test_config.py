"""Settings from assignments and TOML to dataclasses and back, and what is said about those that cannot be."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestling.config import (
    apply,
    convert,
    describe,
    field_help,
    load_toml,
    merge,
    parse_assignments,
    read_config,
    to_dict,
    to_toml,
)
from nestling.errors import StorageError, UsageError
from nestling.methods import RECIPES, EndToEnd, Nested, Optimizer
from nestling.methods.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.5
    """How fast."""
    name: str = "plain"
    """What it is
    called."""


@dataclass(frozen=True, kw_only=True)
class Base:
    count: int = 3
    """How many."""


@dataclass(frozen=True, kw_only=True)
class Settings(Base):
    flag: bool = False
    """Whether."""
    limit: int | None = None
    """none: no limit."""
    steps: int | tuple[int, ...] = (1, 2)
    """One, or one per stage."""
    inner: Inner = field(default_factory=Inner)
    undocumented: str = "x"


# Assignments ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given_", "expected"),
    [
        ([], {}),
        (["count=30"], {"count": 30}),
        (["inner.rate=0.05"], {"inner": {"rate": 0.05}}),
        (["inner.rate=0.05", "inner.name=fast"], {"inner": {"rate": 0.05, "name": "fast"}}),
        (["count=1", "count=2", "flag=true", "count=3"], {"count": 3, "flag": True}),
        (["steps=[1, 2, 3]"], {"steps": [1, 2, 3]}),
        (["name=plain text"], {"name": "plain text"}),
        (['name="quoted = text"'], {"name": "quoted = text"}),
        (["name='literal'"], {"name": "literal"}),
        (["name=a=b"], {"name": "a=b"}),
        (["name="], {"name": ""}),
        (["limit=none"], {"limit": "none"}),
        (["rate=1e-3"], {"rate": 1e-3}),
        (["rate=.5"], {"rate": ".5"}),  # no TOML number
        (["flag=True"], {"flag": "True"}),  # nor is this a TOML truth value
        ([" count = 4 "], {"count": 4}),
        (["inner={rate = 1.0}"], {"inner": {"rate": 1.0}}),
        (["inner.rate=1", "inner=2"], {"inner": 2}),
    ],
)
def test_assignments(given_: list[str], expected: dict) -> None:
    assert parse_assignments(given_) == expected


@pytest.mark.parametrize(
    ("given_", "message"),
    [
        (["count"], r"cannot read the setting 'count': expected FIELD=VALUE, such as epochs=30"),
        (["=3"], r"cannot read the setting '=3'"),
        (["inner=2", "inner.rate=1"], r"'inner\.rate' is given both as a value and as a group"),
    ],
)
def test_assignments_that_are_none(given_: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_assignments(given_)


def test_merging() -> None:
    base = {"a": 1, "inner": {"x": 1, "y": {"z": 2}}}
    over = {"inner": {"y": {"w": 3}, "x": 5}, "b": 2}
    assert merge(base, over) == {"a": 1, "b": 2, "inner": {"x": 5, "y": {"z": 2, "w": 3}}}
    assert base == {"a": 1, "inner": {"x": 1, "y": {"z": 2}}}, "changed in place"
    assert merge({"a": {"x": 1}}, {"a": 2}) == {"a": 2}


# Applying ------------------------------------------------------------------------------------------------------------


def test_applying() -> None:
    changes = {"count": 7, "flag": True, "limit": 4, "steps": [5, 6], "inner": {"rate": 2}}
    made = apply(Settings(), changes)
    assert made == Settings(count=7, flag=True, limit=4, steps=(5, 6), inner=Inner(rate=2.0))
    assert isinstance(made.inner.rate, float) and isinstance(made.steps, tuple)
    assert apply(made, {"limit": "none", "steps": 9}) == replace(made, limit=None, steps=9)
    assert apply(made, {}) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": "many"}, r"count must be an integer, got 'many'"),
        ({"count": 2.5}, r"count must be an integer, got 2\.5"),
        ({"count": True}, r"count must be an integer, got True"),
        ({"count": "none"}, r"count must be an integer, got 'none'"),
        ({"flag": 1}, r"flag must be true or false, got 1"),
        ({"flag": "yes"}, r"flag must be true or false, got 'yes'"),
        ({"limit": "all"}, r"limit must be an integer or none, got 'all'"),
        ({"steps": []}, r"steps must be an integer or a list of integers, got \[\]"),
        ({"steps": [1, "two"]}, r"steps must be an integer, got 'two'"),
        ({"inner": {"rate": "fast"}}, r"inner\.rate must be a number, got 'fast'"),
        ({"inner": {"rate": [1.0]}}, r"inner\.rate must be a number, got \[1\.0\]"),
        ({"inner": {"name": 3}}, r"inner\.name must be text, got 3"),
        ({"inner": 3}, r"inner is a group of fields: set for example inner\.rate=…"),
        ({"cuont": 3}, r"unknown field cuont: expected one of 'count', .* Did you mean 'count'\?"),
        ({"inner": {"rat": 1}}, r"unknown field inner\.rat: .* Did you mean 'inner\.rate'\?"),
        ({"count": {"x": 1}}, r"count must be an integer, got"),
    ],
)
def test_settings_that_do_not_fit(changes: dict, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        apply(Settings(), changes)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (int, "an integer"),
        (float | tuple[float, ...], "a number or a list of numbers"),
        (int | None, "an integer or none"),
        (tuple[int, ...], "a list of integers"),
        (str, "text"),
        (bool, "true or false"),
    ],
)
def test_types_in_words(kind: Any, words: str) -> None:
    assert describe(kind) == words


def test_none_is_a_word() -> None:
    assert convert("x", "none", int | None) is None
    assert convert("x", None, int | None) is None
    assert convert("x", "none", str) == "none", "a field of text may say so itself, as calibration does"


# TOML ----------------------------------------------------------------------------------------------------------------

ODD = [
    "plain",
    "",
    "two words",
    'quote " and \\ backslash',
    "new\nline\ttab\r",
    "café ☃",
    "😀 past U+FFFF",
    "\x00\x1f\x7f",
    "[table]",
    "# no comment",
    "a.b",
    "'",
    "true",
    "1.5",
    "=",
    "\u2028",
    "\x80\x9f",
]


@pytest.mark.parametrize("text", ODD)
def test_any_text_comes_back(text: str) -> None:
    tables = {"value": text, "list": [text, text], "group": {text or "empty": {"x": text}}}
    assert tomllib.loads(to_toml(tables)) == tables


values = st.recursive(
    st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)
names = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@given(st.dictionaries(names, st.recursive(values, lambda t: st.dictionaries(names, t, max_size=3), max_leaves=12)))
def test_toml_round_trip(tables: dict) -> None:
    """Values at the top stay above the tables, empty tables stay, and floats keep every digit."""
    assert tomllib.loads(to_toml(tables)) == tables


def test_toml_by_hand() -> None:
    made = to_toml(
        {"seed": 0, "method": "nested", "known": {"coarse": 1.0}, "a": {"b c": {"lr": (1e-3, 0.5)}}, "x": None}
    )
    assert made == (
        'seed = 0\nmethod = "nested"\n\n[known]\ncoarse = 1.0\n\n[a."b c"]\nlr = [0.001, 0.5]\n'
    )  # fmt: skip


def test_numbers_of_numpy_are_written_as_numbers() -> None:
    import numpy as np

    assert to_toml({"x": np.float64(0.25)}) == "x = 0.25\n"


def recipes() -> list[Any]:
    changed = [
        Nested(epochs=(1, 2, 3), steps_per_epoch=None, patience=None, calibration="none"),
        Nested(epochs=7, steps_per_epoch=4, patience=2, optimizer=Optimizer(lr=(0.1, 1e-5, 3e-3), schedule="plateau")),
        EndToEnd(norm="none", patience=None),
    ]
    return [*(kind() for kind in RECIPES.values()), *changed]


@pytest.mark.parametrize("recipe", recipes(), ids=lambda r: r.method)
@pytest.mark.parametrize("patience", [None, 17])
def test_a_recipe_survives_its_file(recipe: Any, patience: int | None, tmp_path: Path) -> None:
    """Written as [given], read as --config onto the defaults: None, too, where the default is a number."""
    recipe = replace(recipe, patience=patience)
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml({"given": to_dict(recipe), "derived": {"x": {"value": 1}}}), encoding="utf-8")
    onto = replace(type(recipe)(), patience=5, steps_per_epoch=3)
    assert apply(onto, read_config(path)) == recipe


def test_none_is_written() -> None:
    assert to_dict(Settings()) == {
        "count": 3,
        "flag": False,
        "limit": "none",
        "steps": (1, 2),
        "inner": {"rate": 0.5, "name": "plain"},
        "undocumented": "x",
    }


def test_configurations_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read the configuration .*absent\.toml: No such file.*check the path"):
        read_config(tmp_path / "absent.toml")
    for content in (b"a = \n", b"\xff\xfe", b"a = 1\na = 2\n", b"[" * 5000):
        (tmp_path / "bad.toml").write_bytes(content)
        with pytest.raises(UsageError, match=r"bad\.toml is not TOML"):
            read_config(tmp_path / "bad.toml")
        with pytest.raises(StorageError, match=r"bad\.toml.*delete the run folder"):
            load_toml(tmp_path / "bad.toml")
    (tmp_path / "plain.toml").write_text("epochs = 3\n[optimizer]\nlr = 0.1\n")
    assert read_config(tmp_path / "plain.toml") == {"epochs": 3, "optimizer": {"lr": 0.1}}


# Help ----------------------------------------------------------------------------------------------------------------


def test_help_by_hand() -> None:
    assert field_help(Settings) == [
        ("count", "an integer", 3, "How many."),
        ("flag", "true or false", False, "Whether."),
        ("limit", "an integer or none", None, "none: no limit."),
        ("steps", "an integer or a list of integers", (1, 2), "One, or one per stage."),
        ("inner.rate", "a number", 0.5, "How fast."),
        ("inner.name", "text", "plain", "What it is\ncalled."),
        ("undocumented", "text", "x", ""),
    ]


@pytest.mark.parametrize("method", RECIPES)
def test_every_field_of_a_method_is_documented(method: str) -> None:
    kind = RECIPES[method]

    def dotted(settings: Any, prefix: str = "") -> list[str]:
        found = []
        for f in fields(settings):
            value = getattr(settings, f.name)
            found += dotted(value, f"{prefix}{f.name}.") if is_dataclass(value) else [prefix + f.name]
        return found

    rows = field_help(kind)
    assert [name for name, *_ in rows] == dotted(kind())
    assert not [name for name, _, _, text in rows if not text.strip()], "fields without a docstring"
    own = {f.name for f in fields(kind)} - {f.name for f in fields(Recipe)}
    assert len(own) <= 18, "a recipe has at most eighteen fields beside those that all have"
    for name, kind_in_words, default, _ in rows:
        assert kind_in_words and "<class" not in kind_in_words
        outer, _, inner = name.partition(".")
        given_ = getattr(kind(), outer)
        assert default == (getattr(given_, inner) if inner else given_)
