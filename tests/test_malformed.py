"""Whatever is wrong with an input, it ends in one clear line or a correct result: generated tables, encodings, huge
fields, taxonomies, pictures and configurations, all in one process.

Never a traceback, never more than 5 seconds of processor time, never a file outside the output folder.
"""

from __future__ import annotations

import io
import json
import os
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from nestling import LabelledData
from nestling.errors import NestlingError
from running import nestling

LIMIT = 5
"""Seconds of processor time for each."""
CODES = {0, 2, 3, 5}
"""Exit codes of what is fine, and of what the user got wrong."""


@dataclass(frozen=True)
class Case:
    """Files of a folder, and the command that reads them."""

    files: dict[str, bytes]
    command: tuple[str, ...]


def photograph(kind: str) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


PICTURES = {kind: photograph(kind) for kind in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM")}

name = st.sampled_from(
    ["a", "b", "dog", "Dog", "", " ", "a/b", "..", "\x00", "é", "\u202e", "-1", "nan", "1e999", '"', "="]
)
cell = name | st.text(max_size=6) | st.integers(50_000, 200_000).map(lambda size: "x" * size)
header = st.lists(
    st.sampled_from(["path", "text", "coarse", "fine", "split", "id", "group", "", "image"]), min_size=1, max_size=5
)
encoding = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "latin-1", "cp1252", "utf-32"])


@st.composite
def tables(draw: st.DrawFn) -> Case:
    """CSV and TSV, with lines of any length, in any encoding, with bytes put in."""
    columns = draw(header)
    lines = [columns, *draw(st.lists(st.lists(cell, max_size=6), max_size=6))]
    separator = draw(st.sampled_from([",", ";", "\t", "|"]))
    end = draw(st.sampled_from(["\n", "\r\n", "\r", ""]))
    content = end.join(separator.join(line) for line in lines).encode(draw(encoding), "replace")
    place = draw(st.integers(0, len(content)))
    content = content[:place] + draw(st.binary(max_size=4)) + content[place:]
    source = draw(st.sampled_from(["t.csv", "t.tsv"]))
    fix = draw(st.sampled_from([(), ("--fix", "OUT/copy.csv"), ("--fix", "OUT/copy")]))
    levels = draw(st.sampled_from([(), ("--levels", "coarse,fine"), ("--levels", "fine")]))
    checked = ("lint", f"IN/{source}", *levels, *fix, "--json", "OUT/l.json")
    command = draw(st.sampled_from([checked, planned(f"IN/{source}", levels)]))
    return Case({source: content, "a": PICTURES["PNG"]}, command)


def planned(source: str, levels: tuple[str, ...] = ()) -> tuple[str, ...]:
    """All of a training but its steps: the source is read and cut, the method chosen, the network built."""
    return ("train", source, *levels, "--dry-run", "--out", "OUT/run")


@st.composite
def taxonomies(draw: st.DrawFn) -> Case:
    """Edges and JSON beside a proper table."""
    rows = "text,coarse,fine\n" + "".join(f"text {n},{'ab'[n % 2]},{'xy'[n % 2]}\n" for n in range(6))
    if draw(st.booleans()):
        edges = draw(st.lists(st.lists(name, min_size=1, max_size=3), max_size=8))
        return Case(
            {"t.csv": rows.encode(), "tree.csv": "\n".join(map(",".join, edges)).encode("utf-8", "replace")},
            ("lint", "IN/t.csv", "--taxonomy", "IN/tree.csv", "--fix", "OUT/copy.csv"),
        )
    value = st.recursive(
        st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | name,
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["levels", "classes", "parent", "coarse", "fine"]), inner, max_size=4)
        ),
        max_leaves=12,
    )
    proper = {
        "levels": ["coarse", "fine"],
        "classes": {"coarse": ["a", "b"], "fine": ["x", "y"]},
        "parent": {"coarse": [-1, -1], "fine": [0, 1]},
    }
    content = {**proper, **draw(st.dictionaries(st.sampled_from(list(proper)), value, max_size=2))}
    text = json.dumps(content if draw(st.booleans()) else draw(value))
    return Case({"t.csv": rows.encode(), "t.json": text.encode()}, ("lint", "IN/t.csv", "--taxonomy", "IN/t.json"))


@st.composite
def pictures(draw: st.DrawFn) -> Case:
    """A tree of folders with pictures that were cut off, overwritten or are none."""
    files = {"a/x/1.png": PICTURES["PNG"], "b/y/2.png": PICTURES["PNG"][::-1]}
    for number in range(draw(st.integers(1, 3))):
        content = bytearray(draw(st.sampled_from(list(PICTURES.values()))))
        for _ in range(draw(st.integers(0, 4))):
            content[draw(st.integers(0, min(len(content), 80) - 1))] = draw(st.integers(0, 255))
        end = draw(st.integers(0, len(content)))
        suffix = draw(st.sampled_from([".png", ".jpg", ".gif", ".tif", ".webp", ".PNG", ".txt"]))
        files[f"{draw(st.sampled_from(['a/x', 'a', 'b/y', 'b/y/z', '.']))}/{number + 3}{suffix}"] = bytes(content[:end])
    fix = draw(st.sampled_from([(), ("--fix", "OUT/copy")]))
    return Case(files, draw(st.sampled_from([("lint", "IN", *fix, "--json", "-"), planned("IN")])))


@st.composite
def configurations(draw: st.DrawFn) -> Case:
    """TOML that is none, unknown fields, values of any kind; and the same by --set."""
    key = st.sampled_from(
        ["epochs", "optimizer", "optimizer.lr", "batch_size", "given", "known", "seed", "levels", "é"]
    )
    value = st.sampled_from(
        ["1", "-1", "nan", "inf", "1e999", '"x"', "[1, 2]", "{a = 1}", "true", "[", "", "2026-01-01"]
    )
    text = "\n".join(f"{draw(key)} = {draw(value)}" for _ in range(draw(st.integers(0, 4))))
    content = text.encode(draw(encoding)) + draw(st.binary(max_size=2))
    assignments = [f"{draw(key)}={draw(value)}" for _ in range(draw(st.integers(0, 2)))]
    method = draw(st.sampled_from(["nested", "robust", "coins", "layerwise", "end-to-end", "nothing"]))
    given = ("--set", *assignments) if assignments else ()
    command = ("train", "IN/none.csv", "--method", method, "--config", "IN/c.toml", *given, "--out", "OUT/run")
    return Case({"c.toml": content}, command)


@contextmanager
def limited() -> Iterator[None]:
    """A hang becomes an error. Processor time, since a busy machine is no hang."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def content_of(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def check(case: Case) -> None:
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        for file, content in case.files.items():
            (root / "in" / file).parent.mkdir(parents=True, exist_ok=True)
            (root / "in" / file).write_bytes(content)
        (root / "out").mkdir()
        (root / "here").mkdir()
        before, cwd = content_of(root / "in"), Path.cwd()
        os.chdir(root / "here")
        try:
            with warnings.catch_warnings(), limited():
                warnings.simplefilter("ignore")
                done = nestling(
                    *(
                        word.replace("IN", str(root / "in"), 1).replace("OUT", str(root / "out"))
                        for word in case.command
                    )
                )
        finally:
            os.chdir(cwd)
        assert done.code in CODES and "Traceback" not in done.err, done
        complaints = [line for line in done.err.splitlines() if line.startswith("nestling: ")]
        assert len(complaints) <= 1 and (complaints or done.code in (0, 3)), done
        if done.code == 0 and "-" in case.command:
            assert json.loads(done.out)["errors"] == 0
        assert content_of(root / "in") == before
        assert not list((root / "here").iterdir()) and sorted(p.name for p in root.iterdir()) == ["here", "in", "out"]


relaxed = settings(suppress_health_check=list(HealthCheck))
label = st.none() | st.booleans() | st.integers(-2, 3) | st.floats() | name
labels = st.lists(label | st.lists(label, max_size=3) | st.dictionaries(name, label, max_size=2), max_size=5)


@settings(relaxed, max_examples=200)
@given(labels, st.booleans())
def test_labels_in_memory_are_taken_or_refused(given_labels: list, array: bool) -> None:
    inputs = np.zeros((len(given_labels), 4, 4), np.uint8)
    with warnings.catch_warnings(), limited():
        warnings.simplefilter("ignore")
        try:
            data = LabelledData.from_arrays(inputs, np.array(given_labels, object) if array else given_labels)
        except NestlingError:
            return
    assert len(data) == len(given_labels)


cases = st.one_of(tables(), tables(), taxonomies(), pictures(), configurations())


@settings(relaxed, max_examples=200)
@given(cases)
def test_whatever_is_wrong_ends_in_a_line_or_a_result(case: Case) -> None:
    check(case)


@pytest.mark.long
@settings(relaxed, max_examples=2000, derandomize=False)
@given(cases)
def test_whatever_is_wrong_ends_in_a_line_or_a_result_two_thousand_times(case: Case) -> None:
    check(case)
