"""``make bench`` runs: its figures are of the machine it runs on, and none is asserted here."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROWS = ("loop", "default", "augment", "checkpoint", "help", "import", "concepts", "second-pass")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark at its tiny size, in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bench.py"), "--tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, cwd=ROOT)


def test_every_row_is_measured_and_written(tmp_path: Path) -> None:
    done = bench("--out", str(tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "bench.json").read_text())
    assert written.keys() >= {"command", "commit", "hardware", "versions", "seconds"}
    assert tuple(row["name"] for row in written["rows"]) == ROWS
    for row, line in zip(written["rows"], done.stdout.splitlines(), strict=True):
        low, high = row["spread"]
        assert low <= row["value"] <= high
        assert row["met"] in (True, False)
        assert (row["ratio"] is None) == (row["measure"] != "ours / theirs")
        assert line.startswith(row["name"])
        assert row["target"] in line


def test_an_unknown_row_is_refused(tmp_path: Path) -> None:
    done = bench("--rows", "loop,hlep", "--out", str(tmp_path / "bench.json"))
    assert done.returncode != 0
    assert "Did you mean 'help'?" in done.stderr
    assert not (tmp_path / "bench.json").exists()


def test_each_loop_is_the_first_in_every_other_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import loops

    order: list[str] = []
    by_hand, ours = loops.Bare.run, loops.StageRun.step
    monkeypatch.setattr(loops.Bare, "run", lambda bare, steps: (order.append("b" * steps), by_hand(bare, steps)))
    monkeypatch.setattr(loops.StageRun, "step", lambda run, *given: (order.append("o"), ours(run, *given)))
    size = replace(loops.TINY, rounds=4)
    found = loops.beside(tmp_path / "run", loops.made(size), size)
    # A pair of bursts warms up.
    assert "".join(order) == 3 * "oobbbboo"
    assert [len(side) for side in found] == [4, 4] and min(*found[0], *found[1]) > 0


@pytest.fixture
def paired(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import paired

    return paired


def test_the_median_of_the_pairs_is_held_against_the_target(paired) -> None:
    # In one round a neighbour took the cores from both sides.
    row = paired.Row(
        name="loop", text="", unit="images/s", ours=[98, 49, 99, 97], theirs=[100, 50, 100, 100], target=0.97
    )
    assert row.record()["value"] == pytest.approx(0.98)
    assert row.met
    assert not paired.Row(name="s", text="", unit="s", ours=[3], theirs=[1], target=0.02, at_least=False).met
    less = paired.Row(
        name="i", text="", unit="s", ours=[2.1], theirs=[2], measure="ours - theirs", target=0.2, at_least=False
    )
    assert less.record()["value"] == pytest.approx(0.1)
    assert less.met


def test_both_sides_are_measured_in_turns(paired) -> None:
    order: list[str] = []
    paired.in_turns(lambda: order.append("ours"), lambda: order.append("theirs"), 3)
    assert order == ["theirs", "ours", "ours", "theirs", "theirs", "ours"]
