"""How tests run the command line, and the pictures that they give it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from nestling.files import TEMPORARY, read_lines

QUICK = (
    *("--backbone", "conv:4/8", "--precision", "fp32", "--device", "cpu"),
    *("--set", "epochs=1", "steps_per_epoch=2", "batch_size=16"),
)
"""A training of a moment: its figures mean nothing."""


@dataclass(frozen=True)
class Done:
    """What a command did."""

    code: int
    out: str
    err: str


def nestling(*arguments: object) -> Done:
    """Run a command in this process, as ``nestling`` does."""
    from nestling.cli import run

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run([str(argument) for argument in arguments])
    return Done(code, out.getvalue(), err.getvalue())


def succeed(*arguments: object) -> Done:
    """Run a command that must succeed."""
    done = nestling(*arguments)
    assert done.code == 0, done.err
    return done


def refuse(code: int, parts: Sequence[str], *arguments: object) -> str:
    """Run a command that must fail with this exit code and one line, which holds every part; returns the line."""
    done = nestling(*arguments)
    lines = done.err.splitlines()
    assert (done.code, done.out, len(lines)) == (code, "", 1), done
    assert lines[0].startswith("nestling: ") and "Traceback" not in lines[0] and len(lines[0]) < 700, lines[0]
    for part in parts:
        assert part in lines[0], f"{part!r} is not in {lines[0]!r}"
    return lines[0]


def spawn(*arguments: object, **options: Any) -> subprocess.Popen[str]:
    """Start ``nestling`` as a process of its own, on one thread, its output kept."""
    command = [sys.executable, "-m", "nestling", *map(str, arguments)]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        **options,
    )


def complaint(done: Done) -> str:
    """The one line in which a command that had begun says why it ends: the last, and without traceback."""
    lines = done.err.splitlines()
    assert [line for line in lines if line.startswith("nestling: ")] == lines[-1:], done.err
    assert "Traceback" not in done.err
    return lines[-1]


def metrics(run: Path) -> dict[str, Any]:
    """A run's figures, without what may differ: the time that it took, and the commit, which may change meanwhile."""
    content = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {name: value for name, value in content.items() if name not in ("seconds", "commit")}


def same(run: Path, unbroken: Path) -> None:
    """Two runs ended alike: weights bit for bit, figures, and every logged step once."""
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (run, unbroken)]
    assert weights[0] == weights[1]
    assert metrics(run) == metrics(unbroken)
    assert (run / "metrics.jsonl").read_bytes() == (unbroken / "metrics.jsonl").read_bytes()
    logged = Counter((record["stage"], record["step"]) for record in read_lines(run / "metrics.jsonl"))
    assert logged and set(logged.values()) == {1}
    assert (run / "report.html").stat().st_size > 10_000
    assert leftovers(run) == []


def leftovers(folder: Path) -> list[Path]:
    """Temporary files and folders of ours."""
    return list(folder.rglob(TEMPORARY + "*"))


def everything(folder: Path) -> list[str]:
    """Every file and folder below ``folder``, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def pixels(kind: int, number: int, size: int = 12) -> np.ndarray:
    """uint8 (size, size, 3): a colour for each ``kind``, bright in one half, and noise for each ``number``."""
    image = np.full((size, size, 3), 40.0)
    image[..., kind % 3] = 210
    half = image[: size // 2] if kind % 2 else image[:, : size // 2]
    half /= 2
    noise = np.random.default_rng([kind, number]).normal(0, 8, image.shape)
    return np.clip(image + noise, 0, 255).round().astype(np.uint8)


def picture(path: Path, kind: int = 0, number: int = 0, size: int = 12) -> Path:
    """A PNG of ``pixels``."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels(kind, number, size)).save(path)
    return path


def tree(root: Path, classes: Mapping[str, int], size: int = 12) -> Path:
    """A folder tree with so many pictures in each class folder."""
    for kind, (name, count) in enumerate(classes.items()):
        for number in range(count):
            picture(root / name / f"{number}.png", kind, number, size)
    return root


def table(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> Path:
    """A CSV file."""
    lines = [",".join(map(str, line)) for line in [header, *rows]]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


FOUR = {"red/a": 8, "red/b": 8, "blue/c": 8, "blue/d": 8}
"""Two coarse and four fine classes."""
