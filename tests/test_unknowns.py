"""Classes that training never sees: what is taken away, how well they are told, and what predict says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from nestling.data.dataset import LabelledData
from nestling.data.hold_out import hold_out
from nestling.errors import UsageError
from nestling.evaluate.scores import Scores
from nestling.evaluate.unknowns import Alarm, alarm, auroc, fpr95, novelty, unknown_metrics, unknown_since
from nestling.models.model import Outputs
from nestling.taxonomy import Taxonomy
from running import FOUR, QUICK, nestling, refuse, succeed, tree
from small import small_model


def test_a_held_out_class_goes_with_all_below_it(toy_data: LabelledData) -> None:
    kept, held = hold_out(toy_data, ["middle=fish", "fine=owl"])
    assert kept.taxonomy == held.taxonomy and kept.taxonomy.classes["fine"] == ("wren", "ash", "oak")
    assert kept.taxonomy.classes["middle"] == ("bird", "tree") and len(kept) == len(held) == 120
    assert "held out middle=fish, fine=owl: 120 of 240 rows" in kept.notes
    # Every kept row is the class that it was.
    before = {int(index): row for index, row in zip(toy_data.index, toy_data.labels, strict=True)}
    for part in (kept, held):
        for index, row in zip(part.index, part.labels, strict=True):
            for level, code, old in zip(part.taxonomy.levels, row, before[int(index)], strict=True):
                old_name = toy_data.taxonomy.classes[level][old]
                assert code < 0 or part.taxonomy.classes[level][code] == old_name
                assert code >= 0 or old_name in ("fish", "carp", "pike", "owl")
    # A fish is an animal of no known kind, an owl a bird of none.
    assert sorted(set(unknown_since(held.labels).tolist())) == [1, 2]
    assert (unknown_since(kept.labels) == 3).all()


def test_what_cannot_be_held_out(toy_data: LabelledData) -> None:
    for text, message in (
        ("fine", "names a level and a class"),
        ("fin=owl", "unknown level fin"),
        ("fine=howl", "Did you mean 'owl'"),
    ):
        with pytest.raises(UsageError, match=message):
            hold_out(toy_data, [text])
    below = [toy_data.taxonomy.classes["fine"][k] for k in np.flatnonzero(toy_data.taxonomy.parent["fine"] == 0)]
    with pytest.raises(UsageError, match=r"without a class below it.*hold out middle="):
        hold_out(toy_data, [f"fine={name}" for name in below])
    with pytest.raises(UsageError, match="leaves no class at level 'coarse'"):
        hold_out(toy_data, ["coarse=animal", "coarse=plant"])


def test_auroc_and_fpr95() -> None:
    # By hand: of four pairs the unknown row is above in two, level in one.
    assert auroc([0.1, 0.5], [0.5, 0.3]) == (1 + 0.5 + 1 + 0) / 4
    generator = np.random.default_rng(0)
    known, unknown = generator.normal(size=200).round(1), generator.normal(1, 1, size=90).round(1)
    expected = roc_auc_score([0] * 200 + [1] * 90, [*known, *unknown])
    assert auroc(known, unknown) == pytest.approx(expected)
    # 19 of 20 known rows lie at or below 19; so do two of four unknown ones.
    assert fpr95(np.arange(1, 21), [19, 20, 3, 40]) == 0.5


def scores(taxonomy: Taxonomy, confidence: np.ndarray) -> Scores:
    empty = np.zeros(confidence.shape, np.int64)
    return Scores(taxonomy, taxonomy.levels, confidence, empty, empty, confidence)


def test_the_alarm_keeps_its_rate(toy_taxonomy: Taxonomy) -> None:
    generator = np.random.default_rng(0)

    def draw(count: int) -> np.ndarray:
        return np.minimum.accumulate(generator.random((count, 3)), axis=1)

    test = draw(4000)

    def raised(validation: int) -> np.ndarray:
        """By level; at any level."""
        made = [scores(toy_taxonomy, draw(count)) for count in (99, validation) * 100]
        found = np.stack([test < alarm(a, b, 0.1).least for a, b in zip(made[::2], made[1::2])])
        return np.append(found.mean((0, 1)), found.any(2).mean())

    by_rank, by_share = raised(400), raised(0)
    # The levels' alarms are as likely as each other, and together as likely as was asked for.
    assert by_rank[3] == pytest.approx(0.1, abs=0.015) and np.ptp(by_rank[:3]) < 0.015
    assert np.allclose(by_share[:3], 0.1 / 3, atol=0.01) and by_share[3] < 0.1
    with pytest.raises(UsageError, match="needs 19 calibration rows, and this model has 18"):
        alarm(scores(toy_taxonomy, draw(18)), scores(toy_taxonomy, draw(9)), 0.05)
    with pytest.raises(UsageError, match="has 0"):
        alarm(None, None, 0.05)


def test_what_is_said_of_the_unknown(toy_taxonomy: Taxonomy) -> None:
    raised = Alarm(toy_taxonomy, toy_taxonomy.levels, np.array([0.5, 0.4, 0.3]))
    confidence = np.array([[0.9, 0.8, 0.7], [0.9, 0.8, 0.2], [0.9, 0.3, 0.2], [0.4, 0.4, 0.4], [0.9, 0.9, 0.1]])
    paths = [["animal", "bird", "owl"]] * 4 + [["animal", "bird"]]
    said = raised.describe(confidence, paths)
    assert said[0] is None and said[4] is None
    assert said[1] == {"level": "fine", "text": "a new kind of bird"}
    assert said[2] == {"level": "middle", "text": "a new kind of animal"}
    assert said[3] == {"level": "coarse", "text": "not animal or plant"}


def test_novelty_by_the_formulas(toy_data: LabelledData) -> None:
    model = small_model(toy_data).eval()
    generator = torch.Generator().manual_seed(0)
    sizes = model.calibration.sizes
    logits = {name: torch.randn(5, width, generator=generator) for name, (_, width) in sizes.items()}
    features = {name: torch.randn(5, dim, generator=generator) for name, (dim, _) in sizes.items()}
    found = novelty(model, Outputs(logits, features, features["fine"]))
    assert set(found) == {"path", "softmax", "energy"}
    fine = logits["fine"].double()
    assert np.allclose(found["energy"][:, 2], -np.log(np.exp(fine.numpy()).sum(1)))
    assert np.allclose(found["softmax"][:, 2], 1 - fine.softmax(1).amax(1).numpy(), atol=1e-6)
    assert (np.diff(found["path"], axis=1) >= 0).all()


def test_unknown_metrics_by_hand(toy_taxonomy: Taxonomy) -> None:
    raised = Alarm(toy_taxonomy, toy_taxonomy.levels, np.array([0.5, 0.5, 0.5]))
    known = {"path": 1 - np.array([[0.9, 0.9, 0.9], [0.9, 0.8, 0.4]])}
    other = {"path": 1 - np.array([[0.9, 0.9, 0.3], [0.9, 0.4, 0.3], [0.9, 0.9, 0.9]])}
    found = unknown_metrics(raised, known, {"held out": (other, np.array([2, 1, 2]))}, 0.05)
    coarse, middle, fine = found["levels"]
    assert "held out" not in coarse and (middle["held out"]["n"], fine["held out"]["n"]) == (1, 3)
    assert middle["held out"]["detected"] == 1.0 and fine["held out"]["detected"] == pytest.approx(2 / 3)
    assert fine["false_alarms"] == 0.5 and middle["held out"]["auroc"] == {"path": 1.0}
    assert found["placed"] == {"held out": pytest.approx(2 / 3)}


def test_the_command_line(tmp_path: Path) -> None:
    classes = {**dict.fromkeys(FOUR, 40), "red/new": 30}
    source, run = tree(tmp_path / "colours", classes), tmp_path / "run"
    done = succeed("train", source, "--hold-out", "fine=new", *QUICK, "--out", run)
    assert "held out fine=new" in done.err
    config = json.loads((run / "model" / "config.json").read_text(encoding="utf-8"))
    assert config["hold_out"]["classes"] == ["fine=new"]
    taxonomy = json.loads((run / "model" / "taxonomy.json").read_text(encoding="utf-8"))
    assert taxonomy["classes"]["fine"] == ["c", "d", "a", "b"]
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    assert "needs 19 calibration rows" in found["unknown"]["needs"]
    assert all(level["n"] == 32 for level in found["levels"])

    other = tree(tmp_path / "other", {"x/y": 6, "x/z": 6})
    loose = other / "x" / "y"
    done = succeed("evaluate", run, "--false-alarm", "0.2", "--unknown", other, "--unknown", loose, "--json", "-")
    unknown = json.loads(done.out)["unknown"]
    assert unknown["sets"] == ["held out", str(other), str(loose)] and unknown["rate"] == 0.2
    coarse, fine = unknown["levels"]
    assert fine["held out"]["n"] == 6 and "held out" not in coarse
    # All rows where there is no test split, and pictures without class folders.
    assert coarse[str(other)]["n"] == 12 and coarse[str(loose)]["n"] == 6
    assert set(fine["held out"]["auroc"]) == {"path", "softmax", "energy"}
    assert "called unknown at just their level" in succeed("evaluate", run, "--false-alarm", "0.2").out
    refused = nestling("evaluate", run, "--false-alarm", "0.005")
    assert refused.code == 2 and "needs 199 calibration rows, and this model has 13" in refused.err

    answers = json.loads(succeed("predict", run, source / "red" / "new", "--false-alarm", "0.5", "--json", "-").out)
    assert all(set(answer) == {"input", "path", "confidence", "answer", "unknown"} for answer in answers)
    texts = {answer["unknown"]["text"] for answer in answers if answer["unknown"]}
    assert texts <= {"not blue or red", "a new kind of red", "a new kind of blue"}
    refuse(2, ["unknown class at level 'fine' knew", "'new'"], "train", source, "--hold-out", "fine=knew", *QUICK)
    assert nestling("show", run).code == 0
