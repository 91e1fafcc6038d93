"""A run broken off anywhere and started again ends bit for bit where the unbroken run ends, and repeats no step."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nestling import files
from nestling.data.dataset import LabelledData
from nestling.engine import predict, runtime
from nestling.engine import stage as engine_stage
from nestling.engine.fit import fit
from nestling.engine.run import Run
from nestling.engine.select import Judge
from nestling.engine.stage import LOG_EVERY, StageRun
from nestling.errors import BusyError, DataError, Interrupted, StorageError, UsageError
from nestling.files import read_lines
from nestling.lock import RunLock
from nestling.methods.baselines import EndToEnd
from nestling.methods.recipe import Context, Optimizer, Recipe, Select, Stage
from nestling.models.build import build_model
from nestling.models.model import Model
from nestling.objectives.calibration import negative_log_likelihood
from nestling.objectives.terms import CrossEntropy
from small import (
    RECIPES,
    Crash,
    Watch,
    assert_same_weights,
    checkpoint_every_epoch,
    dropout_model,
    one_stage,
    partly_labelled,
    quick,
    recipe_of,
)

CASES = [*RECIPES, "dropout"]


@pytest.fixture(scope="module")
def data(toy_data: LabelledData) -> LabelledData:
    return partly_labelled(toy_data)


def train(case: str, data: LabelledData, out: Path | None, **options: object) -> Run:
    """The same call, each time it is made."""
    if case == "dropout":
        return quick(RECIPES["nested"], data, out, model=dropout_model(data), **options)
    return quick(RECIPES[case], data, out, **options)


@pytest.fixture(scope="module")
def unbroken(data: LabelledData, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Run, list]]:
    """The run of a case that nothing disturbed, and its steps; trained once."""
    done: dict[str, tuple[Run, list]] = {}

    def get(case: str) -> tuple[Run, list]:
        if case not in done:
            with pytest.MonkeyPatch.context() as patch:
                watch = Watch(patch)
                done[case] = train(case, data, tmp_path_factory.mktemp("unbroken") / "run"), watch.taken
        return done[case]

    return get


def assert_same_run(broken: Run, whole: Run) -> None:
    assert_same_weights(broken.model, whole.model)
    assert broken.history == whole.history
    assert broken.metrics == whole.metrics
    assert broken.path is not None and whole.path is not None
    logs = [(run.path / "metrics.jsonl").read_bytes() for run in (broken, whole)]
    assert logs[0] == logs[1]
    given = [(run.path / "recipe.toml").read_text().partition("\n")[2] for run in (broken, whole)]
    assert given[0] == given[1]


def until_done(call: Callable[[], Run], watch: Watch, gaps: Iterator[int], how: str) -> tuple[Run, list[int]]:
    """Call again and again, broken off after the next gap of steps each time; how many were taken at each end."""
    ends = []
    while True:
        setattr(watch, f"{how}_at", len(watch.taken) + next(gaps))
        try:
            return call(), ends
        except (Interrupted, Crash):
            ends.append(len(watch.taken))


@pytest.mark.parametrize("case", CASES)
def test_stopped_by_signals(
    case: str, data: LabelledData, unbroken: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, steps = unbroken(case)
    watch, chance = Watch(monkeypatch), random.Random(case)
    run, ends = until_done(
        lambda: train(case, data, tmp_path / "run"), watch, iter(lambda: chance.randint(1, 7), None), "stop"
    )
    assert len(ends) >= 3, "hardly a test: the run was stopped less than three times"
    assert watch.taken == steps, "a signal saves, so that every step is taken once"
    assert_same_run(run, whole)


def test_a_signal_during_a_replay_stops_the_run(
    data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the stage that was being replayed, not after the next one that is trained."""
    train("nested", data, tmp_path / "run")
    watch = Watch(monkeypatch)
    watch.stop_at = 0
    with pytest.raises(Interrupted, match="stopped by signal 15 after stage coarse"):
        train("nested", data, tmp_path / "run")


@pytest.mark.parametrize("case", CASES)
def test_crashed(
    case: str, data: LabelledData, unbroken: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a moment to save: what is repeated began after the last checkpoint, that is in the epoch of the crash."""
    checkpoint_every_epoch(monkeypatch)
    whole, steps = unbroken(case)
    watch, chance = Watch(monkeypatch), random.Random(case)
    # Long enough to pass one epoch each time, else the run would not get on.
    longest = max(step for _, _, step in steps) + 2
    run, ends = until_done(
        lambda: train(case, data, tmp_path / "run"),
        watch,
        iter(lambda: chance.randint(longest, longest + 5), None),
        "crash",
    )
    assert len(ends) >= 1
    attempts = [watch.taken[begin:end] for begin, end in pairwise([0, *ends, len(watch.taken)])]
    for attempt in attempts:
        begin = steps.index(attempt[0])
        assert attempt == steps[begin : begin + len(attempt)]
    for before, after in pairwise(attempts):
        stage, epoch, _ = steps[steps.index(before[-1]) + 1]
        assert after[0] == (stage, epoch, 0), "not the beginning of the epoch that crashed"
    assert attempts[-1][-1] == steps[-1]
    assert_same_run(run, whole)


@pytest.mark.parametrize(
    "moment", ["end_epoch", "finish", "save", "write a file", "after the stage's file", "between renames"]
)
def test_crashed_elsewhere(
    moment: str, data: LabelledData, unbroken: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In validation, before a stage's file, before and amid a checkpoint, and before old ones are deleted."""
    checkpoint_every_epoch(monkeypatch)
    where, name = {
        "end_epoch": (StageRun, "end_epoch"),
        "finish": (StageRun, "finish"),
        "save": (StageRun, "save"),
        "write a file": (files.os, "fsync"),
        "after the stage's file": (files.shutil, "rmtree"),
        "between renames": (files.os, "replace"),
    }[moment]
    original, calls, crashes = getattr(where, name), 0, {2, 3, 5}

    def crash(*arguments: object, **options: object) -> object:
        nonlocal calls
        calls += 1
        if calls in crashes:
            raise Crash
        return original(*arguments, **options)

    monkeypatch.setattr(where, name, crash)
    for attempt in range(len(crashes) + 1):
        try:
            run = train("nested", data, tmp_path / "run")
            break
        except Crash:
            assert attempt < len(crashes)
    assert calls > max(crashes), "not every crash came"
    assert_same_run(run, unbroken("nested")[0])


@pytest.mark.parametrize("case", ["nested", "dropout"])
def test_finished_runs_are_replayed(
    case: str, data: LabelledData, unbroken: Callable, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = unbroken(case)
    watch = Watch(monkeypatch)
    again = train(case, data, whole.path)
    assert watch.taken == []
    assert_same_run(again, whole)


@pytest.mark.parametrize("case", CASES)
def test_every_logged_step_stands_once(case: str, unbroken: Callable) -> None:
    run, steps = unbroken(case)
    expected = []
    per_epoch = {name: max(step for stage, _, step in steps if stage == name) + 1 for name, _, _ in steps}
    for name, epoch, step in steps:
        taken = epoch * per_epoch[name] + step + 1
        if taken % LOG_EVERY == 1 or step + 1 == per_epoch[name]:
            expected.append((name, epoch, taken))
    records = read_lines(run.path / "metrics.jsonl")
    assert [(r["stage"], r["epoch"], r["step"]) for r in records] == expected
    more = {"reducers"} if case == "robust" else set()
    assert all(r.keys() == {"stage", "epoch", "step", "loss", "lr", "terms"} | more for r in records)
    weighted = [r for r in records if r["stage"] in ("coarse", "flat", "robust", "search")]
    factors = {"instance": 0.5, "proxy": 0.5}
    for r in weighted:
        assert r["loss"] == pytest.approx(sum(factors.get(name, 1) * value for name, value in r["terms"].items()))
    assert weighted


def test_resuming_is_said(data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    watch = Watch(monkeypatch)
    watch.stop_at = 5 + 8
    with pytest.raises(Interrupted, match=r"stopped by signal 15 in stage middle epoch 1 step 3; saved") as error:
        train("nested", data, tmp_path / "run")
    assert error.value.exit_code == 143
    watch.stop_at = None
    train("nested", data, tmp_path / "run", verbose=True)
    assert "resumed stage middle epoch 1 step 3\n" in capsys.readouterr().err
    assert watch.taken[13] == ("middle", 1, 3)


def damage(folder: Path, how: str) -> None:
    name = "state.json" if how.startswith("state") else "tensors.safetensors"
    content = bytearray((folder / name).read_bytes())
    if how.endswith("flipped"):
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)
    elif how.endswith("cut"):
        (folder / name).write_bytes(content[: len(content) // 2])
    elif how == "manifest emptied":
        (folder / "manifest.json").write_bytes(b"")
    elif how == "manifest gone":
        (folder / "manifest.json").unlink()
    elif how == "newer format":
        manifest = json.loads((folder / "manifest.json").read_bytes())
        (folder / "manifest.json").write_text(json.dumps(manifest | {"format": 99}))


DAMAGE = ["state flipped", "tensors flipped", "tensors cut", "manifest emptied", "manifest gone", "newer format"]


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over(
    how: str, data: LabelledData, unbroken: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    checkpoint_every_epoch(monkeypatch)
    watch = Watch(monkeypatch)
    watch.stop_at = 5 + 8
    with pytest.raises(Interrupted):
        train("nested", data, tmp_path / "run")
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [folder.name for folder in kept] == ["01-00001-0000000", "01-00001-0000003"]
    damage(kept[-1], how)
    watch.stop_at = None
    run = train("nested", data, tmp_path / "run", verbose=True)
    said = capsys.readouterr().err
    assert str(kept[-1]) in said and "falling back to the checkpoint before" in said
    assert "resumed stage middle epoch 1 step 0\n" in said
    assert watch.taken[13] == ("middle", 1, 0)
    assert_same_run(run, unbroken("nested")[0])


def test_without_a_sound_checkpoint_the_stage_begins_anew(
    data: LabelledData, unbroken: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_every_epoch(monkeypatch)
    watch = Watch(monkeypatch)
    watch.stop_at = 5 + 8
    with pytest.raises(Interrupted):
        train("nested", data, tmp_path / "run")
    for folder in (tmp_path / "run" / "checkpoints").iterdir():
        damage(folder, "tensors flipped")
    # Its new checkpoints sort before the damaged ones, and are kept nevertheless.
    watch.stop_at = 13 + 2
    with pytest.raises(Interrupted):
        train("nested", data, tmp_path / "run")
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["01-00000-0000002"]
    watch.stop_at = None
    run = train("nested", data, tmp_path / "run")
    assert watch.taken[13:16] == [("middle", 0, 0), ("middle", 0, 1), ("middle", 0, 2)]
    assert_same_run(run, unbroken("nested")[0])


def test_a_newer_format_is_not_discarded(data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where nothing else can be read, whoever updates nestling can go on."""
    checkpoint_every_epoch(monkeypatch)
    watch = Watch(monkeypatch)
    watch.stop_at = 5 + 8
    with pytest.raises(Interrupted):
        train("nested", data, tmp_path / "run")
    old, new = sorted((tmp_path / "run" / "checkpoints").iterdir())
    watch.stop_at = None
    for folder, how in ((new, "newer format"), (old, "tensors flipped")):
        damage(folder, how)
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")}
    with pytest.raises(StorageError, match=r"has format 99, newer than .*: update nestling") as error:
        train("nested", data, tmp_path / "run")
    assert error.value.exit_code == 5 and len(watch.taken) == 13
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run" / "checkpoints").rglob("*")} == before


def test_a_damaged_stage_is_an_error_with_a_remedy(data: LabelledData, tmp_path: Path) -> None:
    run = train("end-to-end", data, tmp_path / "run")
    damage(run.path / "stages" / "00-flat", "tensors flipped")
    with pytest.raises(StorageError, match=r"00-flat.* is damaged.*: delete the run folder"):
        train("end-to-end", data, run.path)


def test_a_cut_log_is_an_error(data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Watch(monkeypatch)
    watch.stop_at = 7
    with pytest.raises(Interrupted):
        train("end-to-end", data, tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_bytes(b"{}\n")
    with pytest.raises(StorageError, match=r"metrics\.jsonl is shorter \(3 bytes\)"):
        train("end-to-end", data, tmp_path / "run")


def test_a_signal_between_stages_is_obeyed(
    data: LabelledData, unbroken: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that comes after the last step of a stage, while it is scored and written."""
    finished: list[str] = []
    original = StageRun.finish

    def finish(run: StageRun) -> None:
        original(run)
        finished.append(run.stage.name)

    monkeypatch.setattr(StageRun, "finish", finish)
    for stage in ("middle", "temperature"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nestling.interrupt.received", lambda stage=stage: 2 if stage in finished else None)
            with pytest.raises(Interrupted, match=f"stopped by signal 2 after stage {stage}; saved") as error:
                train("nested", data, tmp_path / "run")
            assert error.value.exit_code == 130
    assert finished == ["coarse", "middle", "fine", "temperature"]
    assert_same_run(train("nested", data, tmp_path / "run"), unbroken("nested")[0])


def test_without_a_folder_a_signal_says_that_nothing_is_saved(
    data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    Watch(monkeypatch).stop_at = 2
    with pytest.raises(Interrupted, match="nothing is saved without out"):
        train("end-to-end", data, None)


# Hooks ---------------------------------------------------------------------------------------------------------------


class Noted(CrossEntropy):
    """A term with a buffer that hooks write to."""

    noise: Tensor

    def __init__(self) -> None:
        super().__init__("fine")
        self.register_buffer("noise", torch.zeros(3))


def hooked(hooks: list[str]) -> Recipe:
    """Two stages: what the first one's hooks draw at random is written into buffers, which the second one builds on."""

    def after_epoch(context: Context) -> None:
        hooks.append("after_epoch")
        context.objective.terms[0].noise += torch.rand(3)  # type: ignore[operator]

    def at_end(context: Context) -> None:
        hooks.append("at_end")
        context.objective.terms[0].noise.mul_(torch.rand(3))  # type: ignore[operator]
        context.model.calibration.set_temperatures("fine", 1 + float(torch.rand(())))
        context.note("drawn", [round(x, 6) for x in context.objective.terms[0].noise.tolist()], "at random")  # type: ignore[operator]

    def build(model: Model, data: LabelledData) -> dict:
        return {"objective": 1.0 * Noted(), "after_epoch": after_epoch, "at_end": at_end}

    first = one_stage(build, epochs=3, steps_per_epoch=3)

    def stages(recipe: Recipe, model: Model, data: LabelledData) -> Iterator[Stage]:
        for stage in first.stages(model, data):
            yield stage
            yield replace(stage, name="second", after_epoch=None, at_end=None, objective=CrossEntropy("fine"))

    return recipe_of(stages)


def test_hooks_are_replayed_not_run_again(
    toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = [], []
    checkpoint_every_epoch(monkeypatch)
    expected = quick(hooked(whole), toy_data, tmp_path / "whole")
    assert whole == ["after_epoch"] * 3 + ["at_end"]
    watch = Watch(monkeypatch)
    # 3 and 6 are ends of epochs, whose hook then is the first thing that the next process does.
    for stop in (3, 4, 6, 7, 10):
        watch.stop_at = stop
        with pytest.raises(Interrupted):
            quick(hooked(broken), toy_data, tmp_path / "broken")
    watch.stop_at = None
    run = quick(hooked(broken), toy_data, tmp_path / "broken")
    assert broken == whole
    assert_same_run(run, expected)
    assert run.decisions[-1] == expected.decisions[-1] and run.decisions[-1][0] == "drawn"


def compared(hooks: list[str]) -> Recipe:
    """Epochs that are compared on all training rows, and a hook before each comparison, which draws at random."""

    def after_epoch(context: Context) -> None:
        hooks.append("after_epoch")
        context.objective.terms[0].noise += torch.rand(3)  # type: ignore[operator]

    def build(model: Model, data: LabelledData) -> dict:
        select = Select(negative_log_likelihood, "training loss", split="train", start=True)
        return {"objective": 1.0 * Noted(), "after_epoch": after_epoch, "select": select}

    return one_stage(build, epochs=3, steps_per_epoch=2)


def test_stopped_while_epochs_are_compared(
    toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between two of six batches: what is saved is the last step's, and neither a step nor a hook comes twice."""
    monkeypatch.setattr(predict, "PIXELS_AT_ONCE", 1)
    whole, broken, batches, original = [], [], [], Judge.score

    def score(judge: Judge, obey: Callable[[], object]) -> tuple[float, dict]:
        def count() -> None:
            batches[-1] += 1
            obey()

        batches.append(0)
        return original(judge, count)

    monkeypatch.setattr(Judge, "score", score)
    watch = Watch(monkeypatch)
    expected = quick(compared(whole), toy_data, tmp_path / "whole")
    assert batches == [6] * 4 and len(watch.taken) == 6
    steps, watch.taken = watch.taken, []
    # The start; then, in each process, the comparison behind the one that the process before was stopped in.
    for nth, place in ((1, "0 step 0"), (2, "0 step 2"), (2, "1 step 2"), (2, "2 step 2")):
        batches.clear()
        monkeypatch.setattr(
            "nestling.interrupt.received", lambda nth=nth: 15 if len(batches) == nth and batches[-1] == 2 else None
        )
        with pytest.raises(Interrupted, match=f"in stage only epoch {place}, while its weights were compared; saved"):
            quick(compared(broken), toy_data, tmp_path / "broken")
    monkeypatch.setattr("nestling.interrupt.received", lambda: None)
    run = quick(compared(broken), toy_data, tmp_path / "broken")
    assert watch.taken == steps and broken == whole == ["after_epoch"] * 3
    assert_same_run(run, expected)


@pytest.mark.parametrize("way", ["predict", "batches"])
@pytest.mark.parametrize("saved", [True, False])
def test_stopped_in_a_hook(
    way: str, saved: bool, toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once where the epoch before it was saved: it runs anew. Else it comes to its end, and no step is lost."""
    monkeypatch.setattr(engine_stage, "CHECKPOINT_SHARE", 1e12 if saved else 1e-12)
    begun, ended = [], []

    def at_end(context: Context) -> None:
        begun.append(1)
        _ = context.predict(context.train) if way == "predict" else list(context.batches(context.train))
        ended.append(1)
        context.model.calibration.set_temperatures("fine", 1 + float(torch.rand(())))

    recipe = one_stage(lambda model, data: {"at_end": at_end}, epochs=2, steps_per_epoch=2)
    expected = quick(recipe, toy_data, tmp_path / "whole")
    watch = Watch(monkeypatch)
    monkeypatch.setattr("nestling.interrupt.received", lambda: 2 if len(begun) == 2 else None)
    with pytest.raises(Interrupted, match=r"in a hook of stage only; saved" if saved else r"after stage only; saved"):
        quick(recipe, toy_data, tmp_path / "broken")
    assert len(ended) == (1 if saved else 2)
    monkeypatch.setattr("nestling.interrupt.received", lambda: None)
    run = quick(recipe, toy_data, tmp_path / "broken")
    assert len(watch.taken) == 4 and len(ended) == 2
    assert_same_run(run, expected)


def test_stopped_while_temperatures_are_fitted(
    data: LabelledData, unbroken: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stage without steps has nothing to save."""
    asked: list[str] = []
    original = StageRun.predict
    monkeypatch.setattr(StageRun, "predict", lambda run, rows: (asked.append(run.stage.name), original(run, rows))[1])
    monkeypatch.setattr("nestling.interrupt.received", lambda: 15 if asked == ["temperature"] else None)
    with pytest.raises(Interrupted, match="in a hook of stage temperature; saved"):
        train("nested", data, tmp_path / "run")
    monkeypatch.setattr("nestling.interrupt.received", lambda: None)
    assert_same_run(train("nested", data, tmp_path / "run"), unbroken("nested")[0])


def test_a_hook_broken_off_draws_the_same_again(
    toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its random numbers depend on neither what ran before it in this process nor on the caller's generator."""
    checkpoint_every_epoch(monkeypatch)
    expected = quick(hooked([]), toy_data, tmp_path / "whole")
    original, crashed = StageRun.finish, []

    def finish(run: StageRun) -> None:
        if not crashed:
            crashed.append(True)
            raise Crash
        original(run)

    monkeypatch.setattr(StageRun, "finish", finish)
    with pytest.raises(Crash):
        quick(hooked([]), toy_data, tmp_path / "broken")
    torch.rand(17)
    assert_same_run(quick(hooked([]), toy_data, tmp_path / "broken"), expected)


@pytest.mark.parametrize(
    ("patience", "epochs"),
    # The best is the second of seven; three more without a better one end at the fifth.
    [(None, 7), (3, 5)],
)
def test_the_best_epoch_and_patience_are_resumed(
    patience: int | None, epochs: int, toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Broken off in the epoch after the best, and again later: its weights and its count are in the checkpoint."""
    scores = iter([3.0, 1.0, 2.0, 2.5, 2.0, 4.0, 1.5])
    seen: list[dict[str, Tensor]] = []

    def build(model: Model, data: LabelledData) -> dict:
        return {
            "select": Select(lambda *_: next(scores), "score"),
            "after_epoch": lambda context: seen.append({n: t.clone() for n, t in context.model.state_dict().items()}),
            "patience": patience,
        }

    recipe, watch = one_stage(build, epochs=7, steps_per_epoch=2), Watch(monkeypatch)
    for stop in (5, 7):
        watch.stop_at = stop
        with pytest.raises(Interrupted):
            quick(recipe, toy_data, tmp_path / "run")
    watch.stop_at = None
    run = quick(recipe, toy_data, tmp_path / "run")
    assert len(run.history) == len(seen) == epochs
    assert [record["score"] for record in run.history] == [3.0, 1.0, 2.0, 2.5, 2.0, 4.0, 1.5][:epochs]
    assert all(torch.equal(run.model.state_dict()[name], tensor) for name, tensor in seen[1].items())


# Settings ------------------------------------------------------------------------------------------------------------


def stopped(data: LabelledData, out: Path, monkeypatch: pytest.MonkeyPatch, **options: object) -> None:
    """A run of end-to-end that got three steps far."""
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch).stop_at = 3
        with pytest.raises(Interrupted):
            train("end-to-end", data, out, **options)


def test_the_precision_of_the_beginning_is_kept(
    data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """auto chose fp32 where the run began; a machine with bf16 instructions goes on with it, and says why."""
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)
    stopped(data, tmp_path / "run", monkeypatch, precision="auto")
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: True)
    fresh = {name: value for name, value, _ in quick(RECIPES["end-to-end"], data, precision="auto").decisions}
    assert fresh["precision"] == "bf16"
    capsys.readouterr()
    run = train("end-to-end", data, tmp_path / "run", precision="auto", verbose=True)
    assert "precision: fp32 (as the run began)\n" in capsys.readouterr().err
    assert_same_weights(run.model, quick(RECIPES["end-to-end"], data, precision="fp32").model)
    recorded = (tmp_path / "run" / "recipe.toml").read_text()
    assert '[derived.precision]\nvalue = "fp32"\nreason = "without bf16 instructions' in recorded


def test_bf16_is_kept_where_it_is_slow(
    data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """Chosen where bf16 is fast, gone on with where it is not: the same weights, and a word about the time."""
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: True)
    stopped(data, tmp_path / "run", monkeypatch, precision="auto")
    whole = quick(RECIPES["end-to-end"], data, precision="bf16")
    monkeypatch.setattr(runtime, "cpu_has_bf16", lambda: False)
    capsys.readouterr()
    run = train("end-to-end", data, tmp_path / "run", precision="auto", verbose=True)
    said = capsys.readouterr().err
    assert (
        "precision: bf16 (as the run began, though this processor has no bf16 instructions and is slower for it)\n"
        in said
    )
    assert_same_weights(run.model, whole.model)
    assert run.history == whole.history
    assert '[derived.precision]\nvalue = "bf16"\n' in (tmp_path / "run" / "recipe.toml").read_text()


OTHER = {
    "seed": ({"seed": 1}, "seed: 0 there, 1 now"),
    "backbone": ({"backbone": "conv:4/4"}, "backbone: conv:4/8 there, conv:4/4 now"),
    "precision": ({"precision": "bf16"}, "precision fp32, and bf16 is asked for"),
}


@pytest.mark.parametrize("what", OTHER)
def test_other_options_are_refused(
    what: str, data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(data, tmp_path / "run", monkeypatch)
    changes, message = OTHER[what]
    with pytest.raises(UsageError, match=message):
        train("end-to-end", data, tmp_path / "run", **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 9}, r"batch_size: 8 there, 9 now"),
        ({"optimizer": Optimizer(lr=0.5)}, r"optimizer\.lr: 0\.003 there, 0\.5 now"),
        ({"patience": 4}, r"patience: none there, 4 now"),
        ({"epochs": 4, "norm": "none"}, r"epochs: 3 there, 4 now; norm: batch there, none now"),
    ],
)
def test_other_fields_are_refused(
    change: dict, message: str, data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = replace(RECIPES["end-to-end"], patience=None)
    with pytest.MonkeyPatch.context() as patch:
        Watch(patch).stop_at = 3
        with pytest.raises(Interrupted):
            quick(recipe, data, tmp_path / "run")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.lock"}
    with pytest.raises(UsageError, match=message):
        quick(replace(recipe, **change), data, tmp_path / "run")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.name != "run.lock"}
    assert after == before


def test_another_method_and_other_rows_are_refused(
    data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped(data, tmp_path / "run", monkeypatch)
    with pytest.raises(UsageError, match=r"method: end-to-end there, flat-marginal now"):
        train("flat-marginal", data, tmp_path / "run")
    relabelled = data.keep({"fine": 0.5}, seed=1)
    for other in (data.subset(range(200)), relabelled):
        with pytest.raises(DataError, match=r"the training data are not those that the run .* was begun with"):
            train("end-to-end", other, tmp_path / "run")


def test_other_first_weights_are_refused(data: LabelledData, tmp_path: Path) -> None:
    def begin(seed: int) -> None:
        torch.manual_seed(seed)
        model = build_model(data.taxonomy, data.image_shape, "conv:4/8", "end-to-end")
        fit(EndToEnd(epochs=1, steps_per_epoch=1), data, model, tmp_path / "run", device="cpu", verbose=False)

    begin(0)
    begin(0)
    with pytest.raises(DataError, match=r"the first weights are not those that the run .* was begun with"):
        begin(1)


def test_a_folder_of_something_else_is_refused(data: LabelledData, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds other files \(notes\.txt"):
        train("end-to-end", data, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_folder_in_use_is_refused(data: LabelledData, tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"), pytest.raises(BusyError, match=r"is held by process \d+"):
        train("end-to-end", data, tmp_path / "run")
