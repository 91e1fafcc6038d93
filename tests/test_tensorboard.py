"""Scalars for TensorBoard: a folder for each stage, and no step twice, however often a run was broken off."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from nestling.data.dataset import LabelledData
from nestling.engine.tensorboard import TensorBoard
from nestling.errors import Interrupted
from small import RECIPES, Crash, Watch, checkpoint_every_epoch, quick

Points = dict[str, list[tuple[str, int, float]]]


class Writer:
    """Stands for ``SummaryWriter``, and for the reader, who takes back what a later writer purges."""

    points: Points
    open: int

    def __init__(self, log_dir: str, purge_step: int) -> None:
        self.mine = type(self).points.setdefault(Path(log_dir).name, [])
        self.mine[:] = [point for point in self.mine if point[1] < purge_step]
        type(self).open += 1

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        self.mine.append((tag, step, value))

    def flush(self) -> None:
        pass

    def close(self) -> None:
        type(self).open -= 1


def install(monkeypatch: pytest.MonkeyPatch) -> type[Writer]:
    """A writer of one's own, without a point."""
    kind = type("Fresh", (Writer,), {"points": {}, "open": 0})
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=kind))
    return kind


def test_every_stage_has_its_figures(toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = install(monkeypatch)
    run = quick(RECIPES["nested"], toy_data, tmp_path / "run")
    assert list(writer.points) == ["00-coarse", "01-middle", "02-fine"]
    assert writer.open == 0
    fine = writer.points["02-fine"]
    assert {tag for tag, _, _ in fine} >= {
        *("loss", "lr", "terms/fine", "epoch/loss", "epoch/validation loss", "epoch/accuracy/fine")
    }
    assert [step for tag, step, _ in fine if tag == "loss"] == [1, 5, 10]
    of_fine = [record for record in run.history if record["stage"] == "fine"]
    found = {tag: value for tag, step, value in fine if step == 5}
    assert found["epoch/validation loss"] == of_fine[0]["validation loss"]
    assert found["epoch/accuracy/coarse"] == of_fine[0]["accuracy"]["coarse"]


@pytest.mark.parametrize("how", ["crash_at", "stop_at"])
@pytest.mark.parametrize("step", [3, 7, 10, 13, 15])
def test_a_resumed_run_repeats_no_step(
    toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, step: int
) -> None:
    """Nor does it lose one, also where the last step of an epoch or of a stage is the last that was saved."""
    checkpoint_every_epoch(monkeypatch)
    unbroken = install(monkeypatch)
    quick(RECIPES["nested"], toy_data, tmp_path / "unbroken")
    broken = install(monkeypatch)
    watch = Watch(monkeypatch)
    setattr(watch, how, step)
    with pytest.raises((Crash, Interrupted)):
        quick(RECIPES["nested"], toy_data, tmp_path / "broken")
    assert broken.open == 0
    watch.stop_at = None
    quick(RECIPES["nested"], toy_data, tmp_path / "broken")
    assert broken.points == unbroken.points


def test_without_folder_or_package_nothing_is_written(
    toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = install(monkeypatch)
    quick(RECIPES["end-to-end"], toy_data)
    assert not writer.points
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    quick(RECIPES["end-to-end"], toy_data, tmp_path / "run")
    assert not (tmp_path / "run" / "tensorboard").exists()


@pytest.mark.filterwarnings("ignore")
def test_tensorboard_itself_reads_it(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # A process that was killed after seven steps, and one that goes on from a checkpoint behind the fourth.
    for steps, done in ((range(1, 8), 0), (range(5, 10), 4)):
        board = TensorBoard(tmp_path, "00-only", done)
        for step in steps:
            board.add(step, {"loss": float(10 * done + step), "terms": {"fine": 1.0}})
        board.flush()
        if done:
            board.close()
    read = EventAccumulator(str(tmp_path / "tensorboard" / "00-only"))
    read.Reload()
    assert [(event.step, event.value) for event in read.Scalars("loss")] == [
        *((step, step) for step in range(1, 5)),
        *((step, 40 + step) for step in range(5, 10)),
    ]
    assert "terms/fine" in read.Tags()["scalars"]
