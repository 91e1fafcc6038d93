"""From a folder of pictures to answers, as a new user would; figures for unbalanced classes; weights; memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from conftest import ROOT
from nestling.commands.notes import imbalance, overconfident
from nestling.commands.weights import load_weights
from nestling.commands.words import hierarchical_lines
from nestling.data.dataset import LabelledData
from nestling.engine.fit import fit
from nestling.engine.step import StepModule
from nestling.errors import UsageError
from nestling.evaluate.hierarchical import hierarchical_scores
from nestling.methods import EndToEnd
from nestling.models.build import build_model
from nestling.taxonomy import Taxonomy
from running import FOUR, QUICK, refuse, succeed, tree


def test_the_example_runs_from_a_folder_to_answers(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHON": sys.executable, "ROWS": "240", "MINUTES": "0.1", "OMP_NUM_THREADS": "1"}
    script = ROOT / "examples" / "own_data.sh"
    done = subprocess.run(
        ["bash", script, tmp_path / "out"], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "method: nested (rows are labelled at every level" in done.stderr
    assert json.loads((tmp_path / "out" / "lint.json").read_text())["errors"] == 0
    (answer,) = json.loads((tmp_path / "out" / "answers.json").read_text())
    (found,) = json.loads((tmp_path / "out" / "found.json").read_text())
    assert len(answer["path"]) == 3 and len(found["hits"]) == 5
    assert (tmp_path / "out" / "run" / "report.html").is_file()


# Hierarchical precision and recall ----------------------------------------------------------------------------------

TREE = Taxonomy.from_paths(["a/p/1", "a/p/2", "a/q", "b/r/3"])


def naive(answers: list[list[set[str]]], truths: list[list[set[str]]]) -> tuple[float, float, float]:
    """HiClass's definition, row by row and set by set."""
    hits = sum(len(a & t) for row, truth in zip(answers, truths, strict=True) for a, t in zip(row, truth, strict=True))
    precision = hits / sum(len(a) for row in answers for a in row)
    recall = hits / sum(len(t) for row in truths for t in row)
    return precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_hierarchical_scores_equal_a_naive_loop(pairs: list[tuple[int, int]]) -> None:
    """Of leaves, one of which ends above the finest level."""
    columns = [[TREE.ancestor(level, of="fine")[leaf] for level in TREE.levels] for leaf in range(4)]
    classes = [
        [{f"{level}{code}"} if code < TREE.num_classes(level) else set() for level, code in zip(TREE.levels, row)]
        for row in columns
    ]
    labels = np.array([[c if c < TREE.num_classes(lv) else -1 for lv, c in zip(TREE.levels, r)] for r in columns])
    said, true = np.array(pairs).T
    answers = {level: np.array(columns)[said, number] for number, level in enumerate(TREE.levels)}
    found = hierarchical_scores(answers, labels[true], TREE)
    expected = naive([classes[leaf] for leaf in said], [classes[leaf] for leaf in true])
    assert (found["precision"], found["recall"], found["f"]) == pytest.approx(expected)


def test_hierarchical_scores_by_hand() -> None:
    """Answer a/p/2 for a/p/1: two of three classes are right. Answer a/p/1 for b/r/3: none. A row known to p alone and
    one without a label do not count."""
    labels = TREE.encode(["a/p/1", "b/r/3", "a/p", ("", "", "")])
    answers = {"coarse": np.array([0, 0, 0, 0]), "middle": np.array([0, 0, 0, 0]), "fine": np.array([1, 0, 0, 0])}
    found = hierarchical_scores(answers, labels, TREE)
    assert found == {
        "precision": pytest.approx(2 / 6),
        "recall": pytest.approx(2 / 6),
        "f": pytest.approx(1 / 3),
        "n": 2,
    }
    assert hierarchical_lines({"hierarchical": found}) == [
        "hierarchical precision 33.3 %, recall 33.3 %, F 33.3 %, over 2 rows"
    ]
    nothing = hierarchical_scores({level: np.zeros(1, int) for level in TREE.levels}, labels[3:], TREE)
    assert nothing == {"precision": None, "recall": None, "f": None, "n": 0} and not hierarchical_lines({})
    with pytest.raises(UsageError, match="expected answers"):
        hierarchical_scores({}, labels, TREE)


def test_imbalance_is_said(toy_data: LabelledData) -> None:
    fine = toy_data.labels[:, -1]
    rows = np.concatenate([np.flatnonzero(fine == 0)[:3], np.flatnonzero(fine == 1)[:40], np.flatnonzero(fine > 1)])
    assert imbalance(toy_data) == []
    (said,) = imbalance(toy_data.subset(rows))
    assert "'fine' is unbalanced: 'wren' has 40 labelled rows and 'owl' 3" in said


# Weights from elsewhere ---------------------------------------------------------------------------------------------


def test_a_backbone_starts_from_a_file(tmp_path: Path, toy_taxonomy: Taxonomy) -> None:
    given_model, model = (build_model(toy_taxonomy, (1, 8, 8), "conv:4/8") for _ in range(2))
    state = {name: tensor.contiguous() for name, tensor in given_model.backbone.state_dict().items()}
    path = str(tmp_path / "weights.safetensors")
    save_file({**state, "fc.weight": torch.zeros(3)}, path)
    assert load_weights(path, model) == ("fc.weight",)
    assert all((model.backbone.state_dict()[name] == tensor).all() for name, tensor in state.items())
    with torch.device("meta"):
        load_weights(path, build_model(toy_taxonomy, (1, 8, 8), "conv:4/8"))
    with pytest.raises(UsageError, match="has the shape"):
        load_weights(path, build_model(toy_taxonomy, (1, 8, 8), "conv:6/8"))
    with pytest.raises(UsageError, match="lacks"):
        load_weights(path, build_model(toy_taxonomy, (1, 8, 8), "conv:4/8/8"))


def test_weights_on_the_command_line(tmp_path: Path) -> None:
    source = tree(tmp_path / "tree", FOUR)
    command = ("train", source, "--method", "end-to-end", *QUICK, "--out", tmp_path / "run", "--weights")
    refuse(2, ["there is no such file"], *command, tmp_path / "none.safetensors")
    (tmp_path / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    refuse(2, ["lacks"], *command, tmp_path / "bad.safetensors")
    (tmp_path / "worse.safetensors").write_bytes(b"no such format at all")
    refuse(5, ["damaged, or no safetensors file"], *command, tmp_path / "worse.safetensors")
    done = succeed(*command[:-1])
    assert "the same command with --baselines says it" in done.err and "hierarchical precision" in done.err


# Memory -------------------------------------------------------------------------------------------------------------


def test_where_memory_runs_out_the_same_batch_goes_in_parts(
    toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of a machine with room, up to rounding, for a network whose rows do not see each other."""

    def train() -> dict[str, torch.Tensor]:
        recipe = EndToEnd(epochs=1, steps_per_epoch=3, batch_size=32, norm="none", augmentation="none", balance="rows")
        run = fit(recipe, toy_data, backbone="conv:4", device="cpu", precision="fp32", verbose=False)
        sizes.append({name: value for name, value, _ in run.decisions}.get("micro_batch"))
        return run.model.state_dict()

    sizes: list[object] = []
    whole = train()
    forward = StepModule.forward

    def narrow(self: StepModule, batch, progress):
        if len(batch.inputs) > 10:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 GiB")
        return forward(self, batch, progress)

    monkeypatch.setattr(StepModule, "forward", narrow)
    parts = train()
    assert sizes == [None, 8]
    for name, tensor in whole.items():
        assert torch.allclose(tensor, parts[name], atol=1e-4), name


@pytest.mark.parametrize(("over", "rows", "warned"), [(0.294, 200, 1), (0.09, 200, 0), (0.294, 20, 0), (None, 200, 0)])
def test_confidence_far_above_accuracy_is_warned_of(over: float | None, rows: int, warned: int) -> None:
    lines = overconfident([{"name": "fine", "overconfidence": over, "n": rows}])
    assert len(lines) == warned and all("'fine'" in line and "29 points" in line for line in lines)
