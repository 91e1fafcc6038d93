"""Rows stay on their side of the cut, whatever labels come later: no figure is of rows that were trained on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from nestling.bundle import load_bundle
from nestling.data.sides import NEITHER, TEST, TRAIN, Sides, cut_alike
from nestling.data.sources import load_data
from running import QUICK, Done, complaint, nestling, picture, succeed, table

CLASSES = {"red": ("a", "b"), "blue": ("c", "d")}


def sheet(folder: Path, fine: float, name: str = "rows.csv", more: int = 0) -> Path:
    """80 pictures and ``more``, each labelled coarsely, this share of them finely."""
    lines = []
    for number in range(80 + more):
        coarse = ("red", "blue")[number % 2]
        known = number < fine * 80
        file = picture(folder / f"{number}.png", number % 4, number)
        lines.append([file.name, coarse, CLASSES[coarse][number // 2 % 2] if known else ""])
    return table(folder / name, ["path", "coarse", "fine"], lines)


def trained(run: Path, source: Path, *more: object) -> Done:
    return succeed("train", source, "--method", "nested", "--out", run, *more, *QUICK)


def test_labels_that_come_later_move_no_row(tmp_path: Path) -> None:
    source = sheet(tmp_path, 0.5)
    run = tmp_path / "run"
    trained(run, source)
    test, train = (set(load_data(source, split).items) for split in ("test", "train"))
    sheet(tmp_path, 1.0, more=20)
    alone = set(load_data(source, "test").items)
    assert alone & train, "the cut by the new labels would take rows of training"
    sides = load_bundle(run).sides
    later = load_data(source, "test", sides=sides)
    assert set(later.items) & train == set() and test <= set(later.items)
    # New rows are cut as always: a fifth of them is tested.
    assert len(later) == len(test) + 4
    assert "80 cut as the earlier run was trained, the others 80/20" in " ".join(later.notes)
    both = set(later.items) | set(load_data(source, "train", sides=sides).items)
    assert len(both) == 100
    done = succeed("evaluate", run)
    assert f"test: {len(later)} rows" in done.out


def test_a_run_that_begins_from_another_says_what_they_share(tmp_path: Path) -> None:
    source = sheet(tmp_path, 0.5)
    trained(tmp_path / "run", source)
    sheet(tmp_path, 1.0)
    done = trained(tmp_path / "on", source, "--init", tmp_path / "run")
    given = len(load_bundle(tmp_path / "run").sides.train)
    assert f"trained on {given} of these {given} rows, of which the calibration rows are taken" in done.err
    assert "test rows, and the figures are better" not in done.err
    # Its own test rows, among them rows that the first run learned from.
    other = sheet(tmp_path, 1.0, "other.csv")
    text = other.read_text(encoding="utf-8").splitlines()
    lines = [line + (",test" if number % 2 else ",train") for number, line in enumerate(text[1:])]
    other.write_text("\n".join([text[0] + ",split", *lines]) + "\n", encoding="utf-8")
    done = trained(tmp_path / "mixed", other, "--init", tmp_path / "run")
    assert "of these 40 test rows, and the figures are better than the model is" in done.err
    # A model that says nothing of its rows.
    (tmp_path / "run" / "model" / "rows.safetensors").unlink()
    done = trained(tmp_path / "bare", source, "--init", tmp_path / "run")
    assert f"hold if {tmp_path / 'run'} was trained on none of these rows" in done.err


def test_a_finished_run_knows_its_rows_again(tmp_path: Path) -> None:
    source = sheet(tmp_path, 0.5)
    trained(tmp_path / "run", source)
    assert "is finished" in trained(tmp_path / "run", source).err
    sheet(tmp_path, 1.0)
    again = nestling("train", source, "--method", "nested", "--out", tmp_path / "run", *QUICK)
    assert again.code == 3 and "not those that the run" in complaint(again) and "choose another --out" in again.err
    source.unlink()
    assert "is finished" in trained(tmp_path / "run", source).err


def test_a_run_finds_its_source_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the same name that lies elsewhere is another one."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    sheet(tmp_path / "here", 1.0)
    sheet(tmp_path / "there", 1.0, more=40)
    monkeypatch.chdir(tmp_path / "here")
    trained(Path("run"), Path("rows.csv"))
    monkeypatch.chdir(tmp_path / "there")
    assert "test: 16 rows" in succeed("evaluate", tmp_path / "here" / "run").out
    assert "test: 16 rows" in succeed("evaluate", tmp_path / "here" / "run", "--errors", "--folds", 2).out
    # Once it is gone the name that was given is all there is: a project may move as a whole.
    (tmp_path / "here").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path / "moved")
    assert "test: 16 rows" in succeed("evaluate", "run").out
    source = json.loads((tmp_path / "moved" / "run" / "model" / "config.json").read_text(encoding="utf-8"))["source"]
    assert source == "rows.csv"


def test_rows_are_known_by_what_they_hold_wherever_they_lie(tmp_path: Path) -> None:
    """Texts in another order; pictures in a table elsewhere, and in a tree, where the place is the label."""
    header, lines = ["text", "kind"], [[f"text number {n}", "ab"[n % 2]] for n in range(30)]
    first = table(tmp_path / "one.csv", header, lines)
    second = table(tmp_path / "two.csv", header, lines[::-1])
    marks = [load_data(path, "all").marks for path in (first, second)]
    np.testing.assert_array_equal(marks[0], marks[1][::-1])
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    found = [load_data(sheet(tmp_path / folder, 1.0), "all").marks for folder in ("a", "b")]
    np.testing.assert_array_equal(*found)
    assert len(set(found[0].tolist())) == 80
    for number in range(80):
        file = tmp_path / "tree" / "ab"[number % 2] / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes((tmp_path / "a" / f"{number}.png").read_bytes())
    assert set(load_data(tmp_path / "tree", "all").marks.tolist()) == set(found[0].tolist())


def test_a_picture_that_moves_into_a_class_folder_stays_on_its_side(tmp_path: Path) -> None:
    """In a tree a label is a place, so that every label that is added moves a file."""
    root = tmp_path / "tree"
    for number in range(80):
        coarse = ("red", "blue")[number % 2]
        fine = (CLASSES[coarse][number // 2 % 2],) if number < 40 else ()
        picture(root.joinpath(coarse, *fine, f"{number}.png"), number % 4, number)
    trained(tmp_path / "run", root)
    test = {Path(item).name for item in load_data(root, "test").items}
    for file in [*root.glob("*/*.png")]:
        coarse, number = file.parent.name, int(file.stem)
        file.rename(file.parent / CLASSES[coarse][number // 2 % 2] / file.name)
    later = load_data(root, "test", sides=load_bundle(tmp_path / "run").sides)
    assert {Path(item).name for item in later.items} == test


def test_equal_rows_are_counted_and_not_mixed_up(tmp_path: Path) -> None:
    """Thirty texts in a hundred rows: the test rows are as many as they were."""
    source = table(tmp_path / "rows.csv", ["text", "kind"], [[f"text {n % 30}", "ab"[n % 2]] for n in range(100)])
    data = load_data(source, "all")
    assert len(set(data.marks.tolist())) == 100
    sides = Sides(train=data.marks[:80], test=data.marks[80:])
    assert load_data(source, "test", sides=sides).items == data.items[80:]


def test_a_part_of_the_training_rows_can_be_gone_on_with(tmp_path: Path) -> None:
    """Finely labelled, say: all of them were on one side, so that they are cut anew, and it is said what that means."""
    source = sheet(tmp_path, 0.5)
    trained(tmp_path / "run", source)
    wanted = {Path(item).name for item in load_data(source, "train").items}
    lines = [line for line in source.read_text(encoding="utf-8").splitlines() if line.split(",")[0] in wanted]
    part = tmp_path / "part.csv"
    part.write_text("path,coarse,fine\n" + "\n".join(lines) + "\n", encoding="utf-8")
    done = trained(tmp_path / "on", part, "--init", tmp_path / "run")
    assert "cut 80/20, stratified by class" in done.err
    rows = len(load_data(part, "test"))
    assert f"trained on {rows} of these {rows} test rows, and the figures are better than the model is" in done.err
    done = succeed("evaluate", tmp_path / "run", "--source", part)
    assert f"warning: the model was trained on {rows} of these {rows} rows" in done.err
    # What the first run was given is known to whoever begins from the second, too.
    first, second = (load_bundle(tmp_path / name).sides for name in ("run", "on"))
    assert set(first.train) <= set(second.train) and second.trained(second.test) == rows


def test_a_group_follows_its_rows_and_the_others_are_cut() -> None:
    """By hand: the new row of the tested group is tested, that of the other trains; strangers are cut 1:1."""
    sides = Sides(train=np.array([1, 2]), test=np.array([3, 4]))
    before = sides.of(np.array([1, 3, 7, 8, 20, 21, 22, 23]))
    assert before.tolist() == [TRAIN, TEST, *[NEITHER] * 6]
    groups = np.array([0, 1, 1, 0, 2, 3, 4, 5])
    part = cut_alike(before, np.zeros((8, 2), dtype=np.int64), (0.5, 0.5), 0, groups)
    assert part[:4].tolist() == [TRAIN, TEST, TEST, TRAIN] and sorted(part[4:].tolist()) == [0, 0, 1, 1]
    alone = cut_alike(np.full(4, NEITHER), np.zeros((4, 2), dtype=np.int64), (0.5, 0.5), 0, None)
    assert sorted(alone.tolist()) == [0, 0, 1, 1]
