"""``make bench`` runs: its figures are of the machine it runs on, and none is asserted here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SPEED = ("loop", "default", "augment", "checkpoint", "help", "import")
MEMORY = ("memory", "resident", "memory-checkpointing", "resident-checkpointing", "epoch-checkpointing", "cached-epoch")
ROBUST = ("concepts", "second-pass")
SEARCH = ("instances", "clusters", "search", "recall-memory", "million-rows")
ATTACKS = ("deepfool",)
FAISS = ("retrieval", "clusters-faiss", "clusters-inertia") if find_spec("faiss") else ()
ROWS = SPEED + MEMORY + ROBUST + SEARCH + ATTACKS + FAISS
WAYS = ["layerwise", "end-to-end", "checkpointing"]


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the benchmark at its tiny size, in a process of its own."""
    command = [sys.executable, str(ROOT / "benchmarks" / "bench.py"), "--tiny", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False, cwd=ROOT)


def test_every_row_is_measured_and_written(tmp_path: Path) -> None:
    if importlib.util.find_spec("foolbox") is None:
        pytest.skip("the row 'deepfool' needs foolbox")
    done = bench("--out", str(tmp_path / "bench.json"))
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "bench.json").read_text())
    assert tuple(row["name"] for row in written["rows"]) == ROWS
    lines = done.stdout.splitlines()
    for row, line in zip(written["rows"], lines):
        low, high = row["spread"]
        assert low <= row["value"] <= high
        assert row["met"] in (True, False)
        assert (row["ratio"] is None) == (row["measure"] != "ours / theirs")
        assert row.keys() >= {"commit", "hardware", "threads", "versions", "seconds"}
        assert line.startswith(row["name"])
        assert row["target"] in line
    titles, *below = lines[len(ROWS) :]
    figures = ["tensors", "peak", "resident", "seconds per epoch", "seconds in all"]
    assert all(figure.replace("seconds", "s") in titles for figure in figures)
    for row, line, way in zip(written["memory"], below, WAYS, strict=True):
        assert (row["network"], row["way"]) == ("k=1", way) and line.split()[:2] == ["k=1", way]
        assert all(row[figure] > 0 for figure in figures) and row["peak"] > row["tensors"]
    # One measurement serves the rows and the table.
    shares = {row["name"]: (row["ours"], row["theirs"]) for row in written["rows"]}
    mine, whole, rival = written["memory"]
    for name, figure, other in zip(MEMORY, ("tensors", "resident") * 2, (whole, whole, rival, rival)):
        assert shares[name] == pytest.approx((mine[figure] / 1e6, other[figure] / 1e6))


def test_a_row_takes_its_own_place_and_leaves_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import bench as program

    path = tmp_path / "bench.json"
    program.add(path, "rows", [{"name": "help", "value": 1}])
    program.add(path, "rows", [{"name": "loop", "value": 2}])
    program.add(path, "memory", [{"name": "k=1 layerwise", "peak": 3}])
    program.add(path, "rows", [{"name": "help", "value": 4}])
    assert json.loads(path.read_text()) == {
        "name": "bench",
        "rows": [{"name": "loop", "value": 2}, {"name": "help", "value": 4}],
        "memory": [{"name": "k=1 layerwise", "peak": 3}],
    }


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


@pytest.mark.parametrize(("way", "more"), [("end-to-end", 4 * 4 * 16 * 16 * 16 + 3 * 592), ("layerwise", 592 + 6800)])
def test_what_one_layer_more_takes(way: str, more: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """End-to-end: the map of 16 rows, and 4 x 4 x 9 + 4 numbers thrice: weights, gradients and momentum.

    Layer by layer: weights alone, those of a classifier of 4 x 4 x 100 + 100 among them.
    """
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory
    from networks import Network

    networks = [Network(width=4, num_blocks=blocks, side=16, batch=16) for blocks in (3, 4)]
    found = [memory.measure(way, network, 1)["tensors"] for network in networks]
    assert found[1] - found[0] == more


def test_every_network_trains_in_every_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """With less memory layer by layer than all at once, the narrower and smaller ones that stand for them here."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import memory
    import networks

    for name, network in networks.NETWORKS.items():
        backbone = network.backbone if network.backbone == "auto" else f"{network.backbone}-4"
        small = replace(network, width=4, num_blocks=3, side=16, batch=16, backbone=backbone)
        found = {way: memory.measure(way, small, 1) for way in networks.WAYS}
        assert found["layerwise"]["tensors"] < found["end-to-end"]["tensors"], name


def test_both_problems_of_a_pair_train_on_kept_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A whole epoch at each call, of the named layer alone."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import epochs
    import loops

    size, computed = loops.TINY, []
    data = loops.made(replace(size, side=16, num_rows=32))
    network = size.networks["k=1"]
    side = epochs.Epochs(network.recipe("layerwise", augmentation="none"), "layer-5", data)
    model = side.run.engine.model
    for number, block in enumerate(model.blocks, 1):  # type: ignore[arg-type]
        block.register_forward_hook(lambda *_, number=number: computed.append(number))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    side()
    side()
    assert computed == [5] * 4
    changed = {name.split(".")[1] for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"4", "layer-5"}


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
