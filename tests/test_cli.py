"""Whatever the user gets wrong: one line, the exit code of the interface, and nothing left behind."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nestling import cli
from nestling.commands import train
from nestling.errors import LostError
from nestling.lock import RunLock
from running import FOUR, QUICK, Done, everything, nestling, picture, refuse, succeed, table, tree

DIGITS = ("train", "digits", "--out", "run")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, and no folder of real data."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NESTLING_DATA", raising=False)
    return tmp_path


# What can be seen from the command line alone.

USAGE: list[tuple[list[str], list[str]]] = [
    ([], ["expected a command", "'train'", "nestling --help"]),
    (["trian"], ["unknown command trian", "'demo', 'train'", "Did you mean 'train'?"]),
    (["--vrsion"], ["unknown option --vrsion", "Did you mean '--version'?"]),
    (["train"], ["SOURCE", "digits", "folder tree"]),
    (["train", "digits", "more"], ["unexpected argument 'more'", "nestling train --help"]),
    (["train", "digits", "--epochs", "3"], ["unknown option --epochs", "--set FIELD=VALUE"]),
    (["train", "digits", "--sed=3"], ["unknown option --sed", "Did you mean '--seed'?"]),
    (["train", "digits", "--out"], ["--out"]),
    (["train", "-x.csv"], ["unknown option -x.csv"]),
    (["train", "digits", "--seed", "1.5"], ["--seed must be an integer", "'1.5'"]),
    (["train", "digits", "--seed", "-1"], ["seed must be an integer of at least 0", "-1"]),
    (["train", "digits", "--seed", "9" * 5000], ["--seed must be an integer"]),
    (["train", "digits", "--image-size", "big"], ["--image-size must be an integer", "'big'"]),
    (["train", "digits", "--precision", "fp8"], ["'fp8'", "--precision", "'bf16'"]),
    (["train", "digits", "--on-bad-image", "fix"], ["'fix'", "--on-bad-image", "'skip'"]),
    (["train", "digits", "--set"], ["--set needs FIELD=VALUE"]),
    (["train", "digits", "--set", "epochs"], ["--set needs FIELD=VALUE", "'epochs'"]),
    (["train", "digits", "--set", "--seed", "1"], ["--set needs FIELD=VALUE", "'--seed'"]),
    (["train", "digits", "--set", "=3"], ["'=3'", "FIELD=VALUE"]),
    (["train", "digits", "--known", "coarse"], ["--known 'coarse'", "level=fraction"]),
    (["train", "digits", "--known", ""], ["--known ''", "level=fraction"]),
    (["train", "digits", "--known", "fine=x"], ["--known 'fine=x'", "level=fraction"]),
    (["train", "digits", "--known", "fine=1,fine=0"], ["'fine' twice"]),
    (["train", "digits", "--config", "none.toml"], ["none.toml", "No such file"]),
    (["train", "digits", "--config", ""], ["configuration"]),
    (["evaluate"], ["RUN"]),
    (["evaluate", "none"], ["there is no run none"]),
    (["evaluate", "none", "--distort", "melt"], ["unknown distortion melt", "'occlude'"]),
    (["evaluate", "none", "--distort", "blur:x"], ["blur:x", "blur:S"]),
    (["evaluate", "none", "--attack", "fgms:0.1"], ["unknown attack fgms", "Did you mean 'fgsm'?"]),
    (["evaluate", "none", "--attack", "deepfool", "fgsm:2"], ["impossible attack 'fgsm:2'", "fgsm:EPS"]),
    (["evaluate", "none", "--attack-level", "fine"], ["--attack-level fine", "without --attack"]),
    (["predict", "none", "a.png"], ["there is no run none"]),
    (["predict", "none"], ["at least one picture"]),
    (["predict", "none", "a.png", "--json", "-", "--csv", "-"], ["--json", "--csv", "stdout"]),
    (["show", "none"], ["there is no run none"]),
    (["show"], ["RUN"]),
    (["demo", "--seeds", "0"], ["--seeds must be at least 1", "0"]),
    (["demo", "--seeds", "many"], ["--seeds must be an integer", "'many'"]),
]


@pytest.mark.parametrize(("arguments", "parts"), USAGE, ids=lambda value: " ".join(value)[:60] or "nothing")
def test_a_wrong_command_line(arguments: list[str], parts: list[str], here: Path) -> None:
    refuse(2, parts, *arguments)
    assert everything(here) == []


# What the source and the recipe must know.

SETTINGS: list[tuple[list[str], int, list[str]]] = [
    (["--method", "nestd"], 2, ["unknown method nestd", "'nested', 'end-to-end'", "Did you mean 'nested'?"]),
    (["--set", "epoch=3"], 2, ["unknown field epoch", "Did you mean 'epochs'?"]),
    (["--set", "optimizer.rate=3"], 2, ["unknown field optimizer.rate", "'optimizer.lr'"]),
    (["--set", "optimizer=3"], 2, ["optimizer is a group of fields", "optimizer.name="]),
    (["--set", "epochs=many"], 2, ["epochs must be an integer or a list of integers", "'many'"]),
    (["--set", "epochs=0"], 2, ["epochs must be at least 1", "0"]),
    (["--set", "epochs=1.5"], 2, ["epochs must be an integer", "1.5"]),
    (["--set", "epochs=true"], 2, ["epochs must be an integer", "True"]),
    (["--set", "epochs=[]"], 2, ["epochs must be an integer", "[]"]),
    (["--set", "epochs=[1,2]"], 2, ["epochs has 2 values for 3 stages"]),
    (["--set", "batch_size=-1"], 2, ["batch_size must be at least 1", "-1"]),
    (["--set", "batch_size=99999999999"], 2, ["batch_size must be", "at most"]),
    (["--set", "optimizer.lr=nan"], 2, ["optimizer.lr must be above 0", "nan"]),
    (["--set", "optimizer.lr=-1"], 2, ["optimizer.lr must be above 0", "-1"]),
    (["--set", "optimizer.lr=1" + "0" * 400], 2, ["optimizer.lr must be a number"]),
    (["--set", "optimizer.lr=[0.1,0.2]"], 2, ["optimizer.lr has 2 values for 3 stages"]),
    (["--set", "optimizer.name=adma"], 2, ["unknown optimizer.name adma", "Did you mean 'adam'?"]),
    (["--set", "norm=layer"], 2, ["unknown norm layer", "'batch', 'none'"]),
    (["--set", "marginal=1"], 2, ["marginal must be true or false", "1"]),
    (["--set", "calibration=no"], 2, ["unknown calibration no", "'temperature'"]),
    (["--set", "marginal=true", "reading=exact"], 2, ["marginal", "reading"]),
    (["--set", "a.b=1", "a.b.c=2"], 2, ["a.b"]),
    (["--known", "coarse=1,mid=.5"], 2, ["unknown level mid", "'middle'", "Did you mean 'middle'?"]),
    (["--known", "coarse=2"], 2, ["fraction", "'coarse'", "[0, 1]", "2.0"]),
    (["--known", "coarse=nan"], 2, ["fraction", "[0, 1]", "nan"]),
    (["--known", "coarse=-0.1"], 2, ["fraction", "[0, 1]", "-0.1"]),
    (["--known", "middle=0.1,fine=0.5"], 2, ["may not rise towards fine", "fine=0.5", "middle=0.1"]),
    (
        ["--known", "fine=0", "--method", "nested"],
        2,
        ["no training row is labelled at level 'fine'", "--known fine=", "--levels"],
    ),
    (["--known", "fine=0", "--method", "end-to-end"], 2, ["no training row is labelled for end-to-end", "'fine'"]),
    (["--levels", "coarse,nope"], 2, ["unknown level of digits nope", "'middle'"]),
    (["--levels", ","], 2, ["levels must be different names"]),
    (["--levels", ""], 2, ["level"]),
    (["--taxonomy", "none.json"], 5, ["none.json", "No such file"]),
    (["--backbone", "resnet9"], 2, ["unknown backbone resnet9", "'resnet18'"]),
    (["--backbone", "conv:8/16/32/64/128"], 2, ["at least 16 pixels", "8x8"]),
    (["--backbone", "conv:"], 2, ["'conv:'", "conv:8-16/32/64"]),
    (["--backbone", "conv:99999999999"], 2, ["conv:99999999999", "widths"]),
    (["--backbone", "resnet18-0"], 2, ["resnet18-0"]),
    (["--backbone", "resnet18", "--set", "norm=none"], 2, ["resnet18", "norm"]),
    (["--image-size", "0"], 2, ["image size", "at least 1"]),
    (["--device", "tpu"], 2, ["unknown device tpu", "'cpu'"]),
    (["--precision", "fp16", "--device", "cpu"], 2, ["fp16", "bf16 or fp32"]),
]


@pytest.mark.parametrize(("arguments", "code", "parts"), SETTINGS, ids=lambda value: str(value)[:60])
def test_a_wrong_setting(arguments: list[str], code: int, parts: list[str], here: Path) -> None:
    refuse(code, parts, *DIGITS, *arguments)
    assert everything(here) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_such_device(here: Path) -> None:
    refuse(2, ["device 'cuda' is not available here", "--device cpu"], *DIGITS, "--device", "cuda")
    assert everything(here) == []


def test_a_setting_is_refused_before_a_baseline_is_trained(here: Path) -> None:
    refuse(2, ["optimizer.lr has 2 values"], *DIGITS, "--baselines", "--set", "optimizer.lr=[0.1,0.2]")
    refuse(2, ["no training row", "'fine'"], *DIGITS, "--baselines", "--method", "nested", "--known", "fine=0")
    assert everything(here) == []


CONFIGS: list[tuple[bytes, list[str]]] = [
    (b"a = = 3", ["is not TOML", "line 1"]),
    (b"\xff\xfe\x00", ["is not TOML"]),
    (b"given = 3", ["'given'", "table", "3"]),
    (b"epoch = 3", ["unknown field epoch", "Did you mean 'epochs'?"]),
    (b"epochs = 'x'", ["epochs must be an integer", "'x'"]),
    (b"optimizer = 3", ["optimizer is a group"]),
    (b"known = 3", ["known must be a table", "3"]),
    (b"[known]\nmid = 1", ["unknown level mid"]),
    (b"[known]\nfine = 'x'", ["fraction", "'fine'", "'x'"]),
    (b"seed = 'x'", ["seed must be an integer", "'x'"]),
    (b"seed = -3", ["seed must be an integer of at least 0", "-3"]),
    (b"method = 'nestd'", ["unknown method nestd"]),
    (b"source = 3", ["source must be text", "3"]),
    (b"levels = 'a'", ["levels must be a list of texts", "'a'"]),
    (b"baselines = 'yes'", ["baselines must be true or false", "'yes'"]),
    (b"precision = 'fp8'", ["unknown precision fp8"]),
    (b"on_bad_image = 'fix'", ["fix", "'skip'"]),
    (b"image_size = 'big'", ["image_size must be an integer", "'big'"]),
]


@pytest.mark.parametrize(("content", "parts"), CONFIGS, ids=lambda value: str(value)[:50])
def test_a_wrong_configuration(content: bytes, parts: list[str], here: Path) -> None:
    (here / "my.toml").write_bytes(content)
    source = [] if content.startswith(b"source") else ["digits"]
    refuse(2, parts, "train", *source, "--out", "run", "--config", "my.toml")
    assert everything(here) == ["my.toml"]


# Sources.


def test_an_unknown_source(here: Path) -> None:
    refuse(2, ["unknown source digts", "'mnist'", "Did you mean 'digits'?", "folder"], "train", "digts")
    refuse(2, ["'./digits'", "no such file or folder"], "train", "./digits")
    refuse(2, ["'no/such'", "no such file or folder"], "train", "no/such")
    refuse(2, ["'none.csv'", "no such file or folder"], "train", "none.csv")
    (here / "notes").write_text("x", encoding="utf-8")
    refuse(2, ["'notes'", ".parquet, .csv, .tsv"], "train", "notes")
    assert everything(here) == ["notes"]


def test_a_known_source_that_is_not_here(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NESTLING_DATA", str(here / "nowhere"))
    refuse(5, ["'grocery'", "--data-dir DIR", "NESTLING_DATA"], "train", "grocery", "--out", "run")
    # What needs no folder does not mind.
    succeed(*DIGITS, *QUICK)


def bad_picture(here: Path) -> tuple[Path, int, list[str]]:
    source = tree(here / "source", FOUR)
    target = source / "red" / "a" / "3.png"
    target.write_bytes(target.read_bytes()[:60])
    return source, 3, ["3.png", "cannot be read as a picture", "--on-bad-image skip"]


def empty_folder(here: Path) -> tuple[Path, int, list[str]]:
    (here / "source").mkdir()
    return here / "source", 3, ["source", "holds no pictures", "class folders"]


def no_class_folders(here: Path) -> tuple[Path, int, list[str]]:
    picture(here / "source" / "0.png")
    return here / "source", 3, ["lie in no class folders"]


def too_few_rows(here: Path) -> tuple[Path, int, list[str]]:
    return tree(here / "source", {"a": 1, "b": 1}), 3, ["2 rows are too few"]


def no_unicode(here: Path) -> tuple[Path, int, list[str]]:
    name = os.fsdecode(b"caf\xe9")
    return tree(here / "source", {name: 2, "b": 2}), 3, ["caf", "no valid Unicode", "rename"]


def rows(here: Path, *more: list[object], levels: tuple[str, ...] = ("coarse", "fine")) -> Path:
    """A table of the tree's pictures, its last rows as given."""
    tree(here / "pictures", FOUR)
    lines = [[f"pictures/{name}/{n}.png", *name.split("/")] for name in FOUR for n in range(8)]
    return table(here / "source.csv", ["path", *levels], [*lines, *more])


def contradiction(here: Path) -> tuple[Path, int, list[str]]:
    source = rows(here, ["pictures/red/a/0.png", "blue", "a"])
    return source, 3, ["'a' has two parents", "'red' in rows 0, 1, 2 and 5 more", "'blue' in row 32", "--qualify-names"]


def missing_file(here: Path) -> tuple[Path, int, list[str]]:
    return rows(here, ["pictures/none.png", "red", "a"]), 3, ["pictures/none.png", "there is no such file"]


def no_labels(here: Path) -> tuple[Path, int, list[str]]:
    source = rows(here)
    text = re.sub(r",[a-z]+,[abcd]$", ",,", source.read_text(encoding="utf-8"), flags=re.MULTILINE)
    source.write_text(text, encoding="utf-8")
    return source, 3, ["no row is labelled", "'coarse', 'fine'"]


def texts(here: Path) -> tuple[Path, int, list[str]]:
    lines = [[f"some words {n}", "ab"[n % 2], "pqrs"[n % 4]] for n in range(40)]
    return table(here / "source.csv", ["text", "coarse", "fine"], lines), 2, ["takes pictures", "are texts"]


def ragged_table(here: Path) -> tuple[Path, int, list[str]]:
    source = rows(here)
    source.write_text(source.read_text(encoding="utf-8") + "one,two\n", encoding="utf-8")
    return source, 3, ["line 34", "2 cells", "3"]


def unique_column(here: Path) -> tuple[Path, int, list[str]]:
    lines = [[f"{n}.png", f"name-{n}"] for n in range(40)]
    return table(here / "source.csv", ["path", "kind"], lines), 3, ["column 'kind' cannot be a level", "--levels"]


def no_path_column(here: Path) -> tuple[Path, int, list[str]]:
    return table(here / "source.csv", ["file", "kind"], [["0.png", "a"]]), 3, ["no column 'path'", "'file', 'kind'"]


def path_in_capitals(here: Path) -> tuple[Path, int, list[str]]:
    return table(here / "source.csv", ["Path", "kind"], [["0.png", "a"]]), 3, ["rename 'Path' to 'path'"]


DATA = [
    bad_picture, empty_folder, no_class_folders, too_few_rows, no_unicode, contradiction, missing_file, no_labels,
    texts, ragged_table, unique_column, no_path_column, path_in_capitals,
]  # fmt: skip


@pytest.mark.parametrize("make", DATA, ids=lambda make: make.__name__)
def test_wrong_data(make: Callable[[Path], tuple[Path, int, list[str]]], here: Path) -> None:
    source, code, parts = make(here)
    before = everything(here)
    refuse(code, parts, "train", source, "--out", "run", *QUICK)
    refuse(code, parts, "train", source, "--out", "run", "--baselines", *QUICK)
    assert everything(here) == before


def test_labels_that_contradict_a_given_taxonomy(here: Path) -> None:
    source = rows(here, ["pictures/red/a/0.png", "blue", "a"])
    edges = here / "edges.csv"
    edges.write_text("parent,child\nred,a\nred,b\nblue,c\nblue,d\n", encoding="utf-8")
    refuse(3, ["row 32", "'a'", "'blue'", "'red'"], "train", source, "--taxonomy", edges, "--out", "run")
    for text, parts in {
        "red,a\nblue,a\n": ["'a' has two parents", "line 1", "line 2"],
        "a,b\nb,a\n": ["cycle", "'a' -> 'b' -> 'a'"],
        "red,a\nred,b\nblue,c\n": ["unknown class", "d"],
    }.items():
        edges.write_text(text, encoding="utf-8")
        refuse(3, parts, "train", source, "--taxonomy", edges, "--out", "run")
    assert not (here / "run").exists()


def test_an_unreadable_picture_can_be_left_out(here: Path) -> None:
    source, _, _ = bad_picture(here)
    done = succeed("train", source, "--out", "run", "--on-bad-image", "skip", *QUICK)
    assert re.search(r"left out, because unreadable: 1 of \d+ pictures: .*3\.png", done.err)
    for more in ((), ("--on-bad-image", "skip")):
        # What the training was told holds for whoever reads its source.
        done = succeed("evaluate", "run", "--split", "all", *more)
        assert "31 rows" in done.out and re.search(r"left out.*3\.png", done.err)
    assert "left out" in succeed("index", "run", source, "--out", "index").err
    assert "labels are probably wrong" in succeed("evaluate", "run", "--errors").out
    refuse(3, ["3.png", "--on-bad-image skip"], "evaluate", "run", "--split", "all", "--on-bad-image", "error")


# Run folders.


def test_other_settings_in_the_same_folder(here: Path) -> None:
    succeed(*DIGITS, *QUICK)
    before = {name: (here / name).read_bytes() for name in everything(here) if (here / name).is_file()}
    refuse(2, ["epochs: 1 there, 2 now", "another --out"], *DIGITS, *QUICK, "--set", "epochs=2")
    refuse(2, ["seed: 0 there, 3 now"], *DIGITS, *QUICK, "--seed", 3)
    refuse(2, ["known.fine: not set there, 0.5 now"], *DIGITS, *QUICK, "--known", "fine=0.5")
    refuse(2, ["method: nested there, end-to-end now"], *DIGITS, *QUICK, "--method", "end-to-end")
    refuse(2, ["precision: fp32 there, not set now"], *DIGITS, *QUICK, "--precision", "auto")
    refuse(2, ["source: digits there"], "train", "mnist", "--out", "run", *QUICK)
    done = succeed(*DIGITS, *QUICK)
    assert "run is finished" in done.err and done.out == "run\n"
    after = {name: (here / name).read_bytes() for name in everything(here) if (here / name).is_file()}
    del before["run/run.lock"], after["run/run.lock"]
    assert after == before


def test_a_folder_of_something_else(here: Path) -> None:
    source = tree(here / "source", FOUR)
    before = everything(here)
    for out in (source, here):
        refuse(2, ["holds other files", "another --out"], "train", source, "--out", out, *QUICK)
    assert everything(here) == before


def test_leftovers_are_cleared_of_this_run_alone(here: Path) -> None:
    """Another run below the folder that is named may be in the middle of writing."""
    others = here / "runs" / "other" / ".nestling-tmp-x"
    others.parent.mkdir(parents=True)
    others.write_bytes(b"")
    refuse(2, ["holds other files"], "train", "digits", "--out", "runs", *QUICK)
    assert others.exists()
    (here / "run").mkdir()
    (here / "run" / ".nestling-tmp-y").write_bytes(b"")
    (here / "run" / "run.lock").write_bytes(b"")
    succeed(*DIGITS, *QUICK)
    assert not (here / "run" / ".nestling-tmp-y").exists()


@pytest.mark.parametrize("out", ["file/run", "file", "/proc/nestling-run", "/dev/null", "x" * 300])
def test_a_folder_that_cannot_be_written(out: str, here: Path) -> None:
    (here / "file").write_text("", encoding="utf-8")
    refuse(5, ["cannot write", out[:100]], "train", "digits", "--out", out, *QUICK)
    assert everything(here) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(here: Path) -> None:
    (here / "closed").mkdir(mode=0o555)
    refuse(5, ["cannot write", "Permission denied", "may write"], "train", "digits", "--out", "closed/run", *QUICK)
    assert everything(here) == ["closed"]


def test_permission_denied(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for root, whom no permission stops."""

    def mkdir(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", mkdir)
    refuse(5, ["cannot write run", "Permission denied", "may write"], *DIGITS, *QUICK)
    assert everything(here) == []


def test_a_busy_folder(here: Path) -> None:
    with RunLock(here / "run"):
        refuse(6, ["run", f"process {os.getpid()}", "another --out"], *DIGITS, *QUICK)
    assert everything(here) == []


def test_a_rank_without_others_is_a_process_by_itself(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a shell that some other launcher left a RANK in: it locks, writes and says what every training does."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with RunLock(here / "run"):
        refuse(6, [f"process {os.getpid()}"], *DIGITS, *QUICK)
    done = succeed(*DIGITS, *QUICK)
    assert done.out and "stage fine:" in done.err
    assert (here / "run" / "recipe.toml").exists()


def test_what_all_processes_meet_is_said_by_the_first(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    wrong = ("train", "digit", "--dry-run", "--seed", "-1")
    monkeypatch.setenv("RANK", "0")
    refuse(2, ["seed"], *wrong)
    monkeypatch.setenv("RANK", "1")
    assert nestling(*wrong) == Done(2, "", "")

    def lost(_: object) -> int:
        raise LostError("rank 1 has lost another process of this run")

    monkeypatch.setattr("nestling.commands.train.train", lost)
    refuse(1, ["rank 1 has lost another process"], *wrong)


def test_data_that_changed_since_the_run_began(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tree(here / "source", FOUR)
    arguments = ("train", source, "--out", "run", *QUICK)
    monkeypatch.setattr("nestling.commands.pipeline.finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        nestling(*arguments)
    monkeypatch.undo()
    monkeypatch.chdir(here)
    original = (source / "red/a/0.png").read_bytes()
    picture(source / "red/a/0.png", 2)
    refuse(3, ["are not those that the run", "put them back", "--out"], *arguments)
    (source / "red/a/0.png").write_bytes(original)
    succeed(*arguments)


# Settings, and where they come from.


def recipe(run: str = "run") -> dict:
    return tomllib.loads(Path(run, "recipe.toml").read_text(encoding="utf-8"))


def test_precedence(here: Path) -> None:
    text = "epochs = 1\nbatch_size = 32\nsteps_per_epoch = 2\nseed = 5\nbackbone = 'conv:4/8'\nprecision = 'fp32'\n"
    text += "[known]\nfine = 0.5\n[optimizer]\nlr = 0.1\nname = 'sgd'\n"
    (here / "my.toml").write_text(text, encoding="utf-8")
    arguments = ["--set", "batch_size=24", "optimizer.lr=0.5", "--seed", "7", "--set=batch_size=16"]
    succeed("train", "digits", "--config", "my.toml", "--out", "run", *arguments)
    given = recipe()["given"]
    assert (given["epochs"], given["batch_size"], given["seed"]) == (1, 16, 7)
    assert (given["optimizer"]["lr"], given["optimizer"]["name"]) == (0.5, "sgd")
    assert given["known"] == {"fine": 0.5} and given["patience"] == recipe()["given"]["patience"]
    # The command line's fractions stand in place of the configuration's.
    succeed("train", "digits", "--config", "my.toml", "--out", "other", "--known", "middle=0.5")
    assert recipe("other")["given"]["known"] == {"middle": 0.5}


def test_a_recipe_is_a_configuration(here: Path) -> None:
    succeed(*DIGITS, *QUICK, "--method", "nested", "--known", "middle=0.5,fine=0.25", "--seed", 3)
    succeed("train", "--config", "run/recipe.toml", "--out", "again", "--device", "cpu")
    assert recipe("again") == recipe("run")
    assert (here / "again/model/model.safetensors").read_bytes() == (here / "run/model/model.safetensors").read_bytes()
    succeed("train", "--config", "run/recipe.toml", "--out", "run")


def test_sets_accumulate(here: Path) -> None:
    given = ["train", "--set", "epochs=3", "a=b=c", "digits", "--set", "epochs=4", "--seed", "1", "--set=x.y=[1, 2]"]
    command = cli.parse(given)
    assert isinstance(command, cli.Train)
    assert command.set == ("epochs=3", "a=b=c", "epochs=4", "x.y=[1, 2]") and command.source == "digits"
    _, fields = train.settings(command)
    assert fields == {"epochs": 4, "a": "b=c", "x": {"y": [1, 2]}}
    behind = cli.parse(["train", "--set", "epochs=3", "--", "-odd=name"])
    assert isinstance(behind, cli.Train) and (behind.source, behind.set) == ("-odd=name", ("epochs=3",))


def test_the_default_folder_is_named_by_the_settings(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestling.commands.pipeline.Pipeline.run", lambda *_: None)
    first = succeed("train", "digits", *QUICK).out
    assert re.fullmatch(r"runs/digits-nested-[0-9a-f]{8}\n", first)
    others = [("--seed", 1), ("--known", "fine=0.5"), ("--method", "end-to-end"), ("--precision", "bf16")]
    others += [("--backbone", "conv:8")]
    names = {first, *(succeed("train", "digits", *QUICK, *more).out for more in others)}
    assert len(names) == 1 + len(others)
    assert succeed("train", "digits", *QUICK).out == first
    source = tree(here / "my pictures.v1", FOUR)
    assert succeed("train", source, *QUICK).out.startswith("runs/my-pictures-nested-")


def test_help() -> None:
    done = succeed("--help")
    assert all(name in done.out for name in ("demo", "train", "evaluate", "predict", "show")) and not done.err
    for method, fields in {"nested": ("reading", "skips"), "end-to-end": ("norm",)}.items():
        done = succeed("train", "--method", method, "--help")
        for field in ("epochs", "optimizer.lr", "batch_size", "balance", *fields):
            assert re.search(rf"^  {re.escape(field)}  \(.*; default .*\)\n      \w", done.out, re.MULTILINE), field
    assert "reading" not in succeed("train", "--help", "--method=end-to-end").out.partition("fields of end-to-end")[2]
    assert nestling("train", "--method", "nope", "--help").code == 2
    assert re.fullmatch(r"nestling \d+\.\d+\.\d+\n", succeed("--version").out)


# Names, memory, and whoever reads the output.


def test_odd_names(here: Path) -> None:
    source = tree(here / "ä source" / "-dash", {"r ed/ä,": 6, "b=lue/c\nd": 6, "b=lue/<e>": 6})
    (here / "link").symlink_to(source)
    succeed("train", "link", "--out=-ö ut\n", *QUICK)
    done = succeed("predict", "./-ö ut\n", "link", "--json", "answers ü.json")
    assert done.out == "" and len(json.loads((here / "answers ü.json").read_text(encoding="utf-8"))) == 18
    # A folder that is named like an entry of the catalogue is meant by its path.
    (here / "digits").symlink_to(source)
    succeed("train", "./digits", "--out", "other", *QUICK)
    classes = json.loads((here / "other/model/taxonomy.json").read_text(encoding="utf-8"))["classes"]
    assert classes == {"coarse": ["b=lue", "r ed"], "fine": ["<e>", "c\nd", "ä,"]}


def test_names_that_are_no_unicode(here: Path) -> None:
    """Of files they may be; of a source, which is written down, not."""
    source = tree(here / "source", dict.fromkeys(FOUR, 4))
    for path in list(source.rglob("*.png")):
        path.rename(path.with_name(os.fsdecode(b"caf\xe9-") + path.name))
    succeed("train", "source", "--out", "run", *QUICK)
    assert "caf\\udce9-" in (here / "run/report.html").read_text(encoding="utf-8")
    done = nestling("predict", "run", source / "red/a", os.fsdecode(b"none\xfe.png"), "--json", "-")
    assert done.code == 3
    names = [Path(answer["input"]).name for answer in json.loads(done.out)]
    assert names == [*(f"caf\\udce9-{number}.png" for number in range(4)), "none\\udcfe.png"]
    source.rename(here / os.fsdecode(b"caf\xe9"))
    refuse(2, ["no valid Unicode", "rename"], "train", os.fsdecode(b"caf\xe9"), "--out", "other", *QUICK)


def test_huge_seeds(here: Path) -> None:
    succeed(*DIGITS, *QUICK, "--seed", 10**40)
    assert recipe()["given"]["seed"] == 10**40


@pytest.mark.parametrize("empty", [np.empty, torch.empty])
def test_memory_runs_out(empty: Callable, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "execute", lambda _: empty(1 << 50))
    refuse(1, ["not enough memory", "batch_size"], "show", "run")


def test_other_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "execute", lambda _: {}["what we forgot"])
    with pytest.raises(KeyError):
        nestling("show", "run")


def test_a_finished_training_does_not_mind_that_nobody_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=broken, flush=broken))
    train.answer("runs/x")


@pytest.mark.parametrize(("arguments", "code"), [(("train", "digits"), 5), (("demo",), 5), (("show", "run"), 0)])
def test_a_training_that_cannot_say_how_far_it_is(
    arguments: tuple[str, ...], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``nestling train … 2>&1 | head`` ends it, and it has not finished; of an answer the reader has seen enough."""

    def broken(_: object) -> int:
        raise BrokenPipeError

    monkeypatch.setattr(cli, "execute", broken)
    monkeypatch.setattr(os, "_exit", sys.exit)
    with pytest.raises(SystemExit) as stop:
        nestling(*arguments)
    assert stop.value.code == code


@pytest.mark.parametrize(("closed", "code"), [("<&-", 0), (">&-", 0), ("2>&-", 0), (">&- 2>&-", 0), (">/dev/full", 5)])
def test_streams_that_are_closed(closed: str, code: int, here: Path) -> None:
    (here / "run").mkdir()
    (here / "run" / "recipe.toml").write_text("[given]\nsource = 'digits'\n", encoding="utf-8")
    command = ["sh", "-c", f'"$0" -m nestling show run {closed}', sys.executable]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == code and "Traceback" not in done.stderr
    assert ("not finished" in done.stdout) == (closed in ("<&-", "2>&-"))
    assert done.stderr == ("nestling: No space left on device\n" if code else "")


CLOSED = """
import sys
from nestling.__main__ import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["show", "run"]])
def test_whoever_reads_has_seen_enough(arguments: list[str], here: Path) -> None:
    """A pipe whose other end is closed before anything is printed."""
    (here / "run").mkdir()
    (here / "run" / "recipe.toml").write_text("[given]\nsource = 'digits'\n", encoding="utf-8")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        command = [sys.executable, "-c", CLOSED, *arguments]
        done = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
