"""A disk that fills, while each kind of file is written: exit 5 in one line, and all that was there before still reads.

A limit on the size of files stands for it: the kernel refuses the byte past it, as it does where no block is left.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from killing import LIMIT
from nestling import from_pretrained
from nestling.bundle import load_bundle
from nestling.commands import pipeline
from nestling.commands.finish import Finish
from nestling.engine.checkpoint import Checkpoints
from nestling.engine.runfolder import RunFolder
from nestling.errors import StorageError
from nestling.files import read_lines
from nestling.lock import RunLock
from running import QUICK, complaint, leftovers, nestling, same, succeed
from small import Watch, checkpoint_every_epoch

COMMAND = ("train", "digits", "--method", "end-to-end", *QUICK, "--set", "epochs=3", "steps_per_epoch=12")

WRITERS = {
    "checkpoint": ("nestling.engine.checkpoint", "write_folder", 2),
    "stage": ("nestling.engine.checkpoint", "write_folder", 4),
    "log": ("nestling.files", "Appender.flush", 2),
    "bundle": ("nestling.bundle", "write_folder", 1),
    "metrics": ("nestling.commands.finish", "write_json", 1),
    "report": ("nestling.commands.finish", "write_text", 1),
}
"""What writes each artefact, and its how-manieth call the disk is full at: the second checkpoint, at the end of the
second epoch; the stage's file, after three; the log's lines of the second epoch."""


@contextmanager
def limit(size: int | None) -> Iterator[None]:
    """No file grows past ``size`` bytes; Python ignores the signal that goes with it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if size is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def full_at(artefact: str, size: int) -> Iterator[list[str]]:
    """From when an artefact is written on, no file grows past ``size``; gives the paths that its writer was given."""
    module, name, number = WRITERS[artefact]
    *path, leaf = name.split(".")
    owner: Any = import_module(module)
    for part in path:
        owner = getattr(owner, part)
    original, calls = getattr(owner, leaf), []

    def write(*arguments: Any, **options: Any) -> Any:
        calls.append(str(getattr(arguments[0], "path", arguments[0])))
        if len(calls) == number:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return original(*arguments, **options)

    with limit(None), pytest.MonkeyPatch.context() as patch:
        checkpoint_every_epoch(patch)
        patch.setattr(owner, leaf, write)
        yield calls


@dataclass(frozen=True)
class Whole:
    """The run whose disk never filled."""

    run: Path
    end: Finish
    sizes: dict[str, tuple[int, int]]
    """From and to where each artefact's file does not fit."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    ends: list[Finish] = []
    finish, run = pipeline.finish, tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "finish", lambda end, *rest: ends.append(end) or finish(end, *rest))
        succeed(*COMMAND, "--out", run)
    # The checkpoint's size, and the log's before and after its second epoch, are those of a run that is stopped there.
    stopped, lengths = run.with_name("stopped"), []
    for _ in range(2):
        with pytest.MonkeyPatch.context() as patch:
            checkpoint_every_epoch(patch)
            Watch(patch).stop_at = 12
            assert nestling(*COMMAND, "--out", stopped).code == 143
        lengths.append((stopped / "metrics.jsonl").stat().st_size)
    *_, checkpoint = sorted((stopped / "checkpoints").glob("*/tensors.safetensors"))
    files = {
        "checkpoint": checkpoint,
        "stage": run / "stages" / "00-flat" / "tensors.safetensors",
        "bundle": run / "model" / "model.safetensors",
        "metrics": run / "metrics.json",
        "report": run / "report.html",
    }
    sizes = {name: (0, path.stat().st_size) for name, path in files.items()}
    return Whole(run, ends[0], sizes | {"log": (lengths[0], lengths[1])})


SHORTER = 16
"""Bytes by which metrics.json may be shorter another time."""
CASES = [
    pytest.param(
        artefact,
        tenth,
        marks=[] if tenth in (3, 9) and artefact in ("checkpoint", "log", "bundle", "report") else [pytest.mark.long],
    )
    for artefact in WRITERS
    for tenth in range(10)
]


@pytest.mark.parametrize(("artefact", "tenth"), CASES)
def test_a_disk_that_fills(artefact: str, tenth: int, whole: Whole, tmp_path: Path) -> None:
    """At ten sizes from the first byte that does not fit to the last one."""
    run, (before, after) = tmp_path / "run", whole.sizes[artefact]
    # Times in metrics.json have other digits, and fewer, when they are taken again.
    size = before + tenth * (after - (SHORTER if artefact == "metrics" else 1) - before) // 9
    old = {}
    if artefact in ("bundle", "metrics", "report"):
        # A finished run, but for the report: its end is done once more, over an older bundle.
        shutil.copytree(whole.run, run)
        (run / "report.html").unlink()
        old = {path: path.read_bytes() for path in [*(run / "model").iterdir(), run / "metrics.json"]}
    with full_at(artefact, size) as written:
        done = nestling(*COMMAND, "--out", run)
    assert (done.code, done.out) == (5, ""), done
    said = complaint(done)
    assert said.startswith(f"nestling: cannot write {written[-1]}: File too large; raise the limit on file sizes and ")
    assert leftovers(tmp_path) == [] and not (run / "report.html").exists()
    if artefact == "bundle":
        assert all(path.read_bytes() == content for path, content in old.items())
    if old:
        load_bundle(run)
    else:
        saved, complaints = Checkpoints(run).latest(0)
        assert saved is not None and complaints == []
        assert saved.state["epoch"] == (3 if artefact == "stage" else 1) and saved.state["step"] == 0
        # What the log holds of later steps is cut off by the resume; no line is torn.
        lines = (run / "metrics.jsonl").read_bytes()
        assert len(read_lines(run / "metrics.jsonl")) == lines.count(b"\n") and lines.endswith(b"\n")

    done = succeed(*COMMAND, "--out", run)
    resumed = f"resumed stage flat epoch {3 if artefact == 'stage' else 1} step 0\n"
    assert (resumed in done.err) == (not old)
    same(run, whole.run)


LIMITED = """
    import resource, sys
    from nestling.__main__ import main
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
    main(sys.argv[2:])
"""

SIZES = (0, 300, 1500, 3000, 5000, 6500, 8000, 9000, 50_000, 150_000)


@pytest.mark.long
@pytest.mark.parametrize("size", SIZES)
def test_a_disk_that_is_full_from_the_beginning(size: int, whole: Whole, tmp_path: Path) -> None:
    """The command as a process of its own, again and again: whatever comes first does not fit."""
    run = tmp_path / "run"
    command = [sys.executable, "-c", textwrap.dedent(LIMITED), str(size), *map(str, COMMAND), "--out", str(run)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (done.returncode, done.stdout) == (5, ""), done
    last = done.stderr.splitlines()[-1]
    assert last.startswith(f"nestling: cannot write {run}") and "File too large; raise the limit" in last
    assert "Traceback" not in done.stderr
    assert leftovers(tmp_path) == [] and not (run / "report.html").exists()
    succeed(*COMMAND, "--out", run)
    same(run, whole.run)


def test_an_older_bundle_and_an_older_report_stay(whole: Whole, tmp_path: Path) -> None:
    """What follows the training, and ``save_pretrained``, written once more over what they wrote before."""
    run = Path(shutil.copytree(whole.run, tmp_path / "run"))
    old = {path: path.read_bytes() for path in [*(run / "model").iterdir(), run / "report.html"]}
    for artefact in ("bundle", "report"):
        with full_at(artefact, whole.sizes[artefact][1] // 2), pytest.raises(StorageError, match="File too large"):
            pipeline.finish(replace(whole.end, folder=RunFolder(run)), [])
    with limit(1000), pytest.raises(StorageError, match=r"cannot write .*model: File too large"):
        whole.end.runs["end-to-end"][0].save_pretrained(run / "model")
    assert leftovers(run) == []
    assert old.pop(run / "model" / "README.md") and all(path.read_bytes() == content for path, content in old.items())
    assert from_pretrained(run).taxonomy == from_pretrained(whole.run).taxonomy


def test_a_lock_that_cannot_name_its_holder_is_given_back(tmp_path: Path) -> None:
    with limit(0), pytest.raises(StorageError, match=r"cannot write .*run: File too large"):
        RunLock(tmp_path / "run").__enter__()
    assert not (tmp_path / "run").exists()
    with RunLock(tmp_path / "run"):
        pass
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    with limit(0), pytest.raises(StorageError):
        RunLock(tmp_path / "mine").__enter__()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["file"]
    with RunLock(tmp_path / "mine"):
        pass
