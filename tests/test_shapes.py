"""The engine under every shape of method: killed and resumed, on two processes, planned without training."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import two_processes
from nestling.engine.plan import plan
from nestling.engine.stage import StageRun
from nestling.methods.recipe import Context
from running import succeed
from small import assert_same_weights, quick, rows
from toy_recipes import RECIPES, Layers, toy_model

HERE = Path(__file__).parent


def environment(**more: str) -> dict[str, str]:
    """One thread, and the packages of this process; gloo finds the other process on this machine."""
    local = {"GLOO_SOCKET_IFNAME": "lo"} if sys.platform == "linux" else {}
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path), **local, **more}


# Kills ---------------------------------------------------------------------------------------------------------------


def kill(folder: Path, kills: int, seed: int) -> dict[str, list[dict[str, Any]]]:
    """What became of the toys that were killed."""
    command = [sys.executable, str(HERE / "toy_kills.py"), str(folder), str(kills), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_killed_toys_end_as_the_unbroken_ones(
    kills: int, tmp_path: Path, record_property: pytest.RecordProperty
) -> None:
    """At a random moment, once each run: it goes on where it was saved, and ends bit for bit in the same."""
    seed = random.randrange(10**6)
    record_property("seed", seed)
    found = kill(tmp_path, kills, seed)
    assert found.keys() == RECIPES.keys()
    for name, killed in found.items():
        assert len(killed) == kills
        for run in killed:
            assert run["killed"] == -signal.SIGKILL and run["code"] == 0, (name, seed, run)
            assert run["went on"], (name, seed, run)
            assert run["equal"], (name, seed, run)
        assert any(run["steps saved"] for run in killed), (name, seed)
    steps = {name: [(run["steps before"], run["steps saved"]) for run in killed] for name, killed in found.items()}
    record_property("steps before each kill, and those of them that were saved", steps)


def test_a_stage_that_ended_narrower_is_replayed(tmp_path: Path) -> None:
    """From its file: shapes, and the widths that layers go by."""
    data = rows()
    whole = quick(RECIPES["layers"], data, tmp_path / "run", model=toy_model("layers", data)).model
    assert isinstance(whole, Layers)
    model = toy_model("layers", data)
    again = quick(RECIPES["layers"], data, tmp_path / "run", model=model)
    assert_same_weights(again.model, whole)
    assert [block[0].out_channels for block in model.blocks] == [4, 4, 4]  # type: ignore[index,union-attr]
    assert [block[0].in_channels for block in model.blocks] == [1, 4, 4]  # type: ignore[index,union-attr]
    assert [block[1].num_features for block in model.blocks] == [4, 4, 4]  # type: ignore[index,union-attr]
    assert [head.in_features for head in model.heads.values()] == [4, 4, 4]  # type: ignore[union-attr,operator]
    images = again.preprocessing(data.images(np.arange(5)))
    torch.testing.assert_close(model(images).embedding, whole(images).embedding)


# The plan ------------------------------------------------------------------------------------------------------------


def test_the_plan_assumes_what_hooks_will_do() -> None:
    data = rows()
    model = toy_model("layers", data)
    planned = plan(RECIPES["layers"], model, data)
    assert model.outputs == ()
    assert [stage.assumes for stage in planned] == ["4 of 8 filters are kept"] * 3
    run = quick(RECIPES["layers"], data, model=model)
    before = {"layer-1": 1 * 8 * 9 + 16 + 8 * 6 + 6, "layer-2": 4 * 8 * 9 + 16 + 8 * 6 + 6}
    assert {stage.name: stage.num_trainable for stage in planned[:2]} == before
    assert sum(p.numel() for p in run.model.blocks[0].parameters()) == 4 * 9 + 8  # type: ignore[index,union-attr]


# Hooks, terms and reducers -------------------------------------------------------------------------------------------


def test_hooks_are_told_the_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    seen: list[tuple[str, int, int]] = []

    def hook(name: str) -> Any:
        def note(context: Context) -> None:
            seen.append((name, context.epoch, context.epochs))

        return note

    recipe, data = RECIPES["robust"], rows()
    original = type(recipe).stages

    def stages(self: Any, model: Any, data: Any) -> Any:
        for stage in original(self, model, data):
            yield replace(stage, after_epoch=hook("epoch"), at_end=hook("end"), after_step=hook("step"))

    monkeypatch.setattr(type(recipe), "stages", stages)
    quick(recipe, data, model=toy_model("robust", data))
    assert [where for where in seen if where[0] != "step"] == [("epoch", 0, 2), ("epoch", 1, 2), ("end", 2, 2)]
    assert {where[1:] for where in seen if where[0] == "step"} == {(0, 2), (1, 2)}


def test_the_second_pass_leaves_the_reducer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state moves once a step, and not while the direction is sought."""
    import toy_recipes

    moves: list[str] = []
    original = toy_recipes.second_pass

    running: list[StageRun] = []
    begin = StageRun.__init__
    monkeypatch.setattr(StageRun, "__init__", lambda run, *given: (running.append(run), begin(run, *given))[1])

    def kept() -> list[torch.Tensor]:
        """Buffers of model and objective: batch norms' statistics, and q."""
        modules = (running[-1].engine.model, running[-1].objective)
        return [buffer.clone() for module in modules for buffer in module.buffers()]

    def spy(loss: Any, batch: Any) -> Any:
        before = kept()
        made = original(loss, batch)
        assert all(torch.equal(one, other) for one, other in zip(before, kept(), strict=True))
        (after,) = [b for name, b in running[-1].objective.named_buffers() if name.endswith("q")]
        assert not torch.equal(made.inputs, batch.inputs)
        length = (made.inputs - batch.inputs).flatten(1).norm(dim=1)
        # A row without any label that the objective reads has no direction.
        assert (torch.isclose(length, torch.tensor(0.5), atol=1e-4) | (length == 0)).all() and (length > 0).any()
        moves.append(str(after.tolist()))
        return made

    monkeypatch.setattr(toy_recipes, "second_pass", spy)
    data = rows()
    quick(RECIPES["robust"], data, model=toy_model("robust", data))
    assert len(moves) > 4 and len(set(moves)) == len(moves)


# Two processes -------------------------------------------------------------------------------------------------------


def run_two_processes(folder: Path) -> dict[str, Any]:
    """Run ``two_processes.py`` on two processes with gloo; what its first process found."""
    out = folder / "found.json"
    command = [sys.executable, str(HERE / "two_processes.py"), str(folder / "meet"), str(out)]
    running = [
        subprocess.Popen(command, env=environment(WORLD_SIZE="2", RANK=str(rank)), stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in running:
            _, errors = process.communicate(timeout=120)
            assert process.returncode == 0, errors[-4000:]
    finally:
        for process in running:
            process.kill()
    return json.loads(out.read_text())


def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Without batch norm, in fp32: losses, weights, faults and decisions."""
    found, expected = run_two_processes(tmp_path), two_processes.results()
    curves = {
        *two_processes.CURVES,
        *(f"toy {name}" for name in RECIPES),
        *(f"micro-batches of {n}" for n in (2, 3, 4)),
    }
    assert found.keys() == expected.keys() >= {"unused parameter", "one process diverges", "metric", *curves}
    for name in sorted(curves):
        theirs, ours = found.pop(name), expected.pop(name)
        assert len(ours["losses"]) >= 2 and theirs["names"] == ours["names"]
        for what in ("losses", "validation", "weights"):
            np.testing.assert_allclose(theirs[what], ours[what], rtol=1e-4, atol=1e-4, err_msg=f"{what} of {name}")
    for what in ("gradient of the mean", "gradient through a gather"):
        np.testing.assert_allclose(found.pop(what), expected.pop(what), rtol=1e-6)
    np.testing.assert_allclose(found.pop("rows of their own"), expected.pop("rows of their own"), rtol=1e-5, atol=1e-6)
    assert found == expected
    assert "model.head.coarse.weight" in expected["unused parameter"]
    assert "the loss is not finite in stage only" in expected["one process diverges"]
    assert expected["metric"] == [0.0, 1.0]


TORCHRUN = (
    *("train", "digits", "--backbone", "conv:8/16", "--precision", "fp32", "--device", "cpu"),
    *("--set", "epochs=[2,2,20]", "batch_size=64"),
)


def test_torchrun(tmp_path: Path) -> None:
    """The command on two processes: one of them speaks and writes, and the result is that of one, within noise."""
    out = tmp_path / "two"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "-m", "nestling", *TORCHRUN, "--out", str(out)],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stdout == f"{out}\n"
    assert len(re.findall(r"^stage fine:", done.stderr, re.MULTILINE)) == 1
    succeed(*TORCHRUN, "--out", tmp_path / "one")
    two, one = (json.loads((run / "metrics.json").read_text()) for run in (out, tmp_path / "one"))
    for mine, theirs in zip(two["levels"], one["levels"]):
        # Two standard deviations of a difference of 450 answers, at the worst.
        assert abs(mine["accuracy"] - theirs["accuracy"]) < 0.07
    assert two["levels"][0]["accuracy"] > 0.85
    again = succeed(*TORCHRUN, "--out", out)
    assert "is finished" in again.err
