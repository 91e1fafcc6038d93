"""Faults put into a run: it stops at once and says what and where, and the same command goes on as if unhurt."""

from __future__ import annotations

import json
import math
import multiprocessing
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor, nn

from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.engine import stage as engine_stage
from nestling.engine.checkpoint import Checkpoints, pick
from nestling.engine.run import Run
from nestling.engine.stage import StageRun
from nestling.errors import DivergedError, Interrupted, StorageError
from nestling.methods.recipe import Recipe, Select
from nestling.models.model import Model, Outputs
from nestling.objectives.calibration import negative_log_likelihood
from nestling.objectives.terms import CrossEntropy
from nestling.taxonomy import Taxonomy
from running import FOUR, QUICK, complaint, nestling, same, succeed, tree
from small import Watch, assert_same_weights, checkpoint_every_epoch, one_stage, quick

EPOCHS, STEPS = 3, 4
KINDS = ("loss", "gradient", "weight", "input", "metric")
VALUES = {"NaN": math.nan, "+inf": math.inf, "-inf": -math.inf}
MOMENTS = {"first": 0, "middle": EPOCHS * STEPS // 2, "last": EPOCHS * STEPS - 1}
CASES = list(product(KINDS, VALUES, MOMENTS))
FEW = CASES[::5]
"""Nine of them: every kind, value and moment."""


class Fault:
    """Puts ``value`` into one step, or into the metric after its epoch; nowhere while ``at`` is None."""

    def __init__(self, kind: str, value: float, at: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.value, self.at = kind, value, at
        self.now: str | None = None
        self.rows: list[int] = []
        step, batch, end_epoch = StageRun.step, DeviceData.batch, StageRun.end_epoch

        def faulty_step(run: StageRun, *arguments: Any) -> None:
            here = run.progress.epoch * STEPS + run.progress.step == self.at
            self.now = self.kind if here else None
            parameter = first_bias(run)
            hook = parameter.register_hook(self.spoilt) if self.now == "gradient" else None
            if self.now == "weight":
                parameter.data = self.spoilt(parameter.data)
            try:
                step(run, *arguments)
            finally:
                self.now = None
                if hook is not None:
                    hook.remove()

        def faulty_batch(data: DeviceData, *arguments: Any, **options: Any) -> Batch:
            made = batch(data, *arguments, **options)
            if self.now is not None:
                self.rows = made.index.tolist()
            if self.now == "input":
                made.inputs.copy_(self.spoilt(made.inputs))
            return made

        def faulty_end(run: StageRun) -> None:
            here = self.at is not None and run.progress.epoch == self.at // STEPS
            self.now = self.kind if here and self.kind == "metric" else None
            end_epoch(run)

        monkeypatch.setattr(StageRun, "step", faulty_step)
        monkeypatch.setattr(DeviceData, "batch", faulty_batch)
        monkeypatch.setattr(StageRun, "end_epoch", faulty_end)

    def spoilt(self, tensor: Tensor) -> Tensor:
        """``tensor`` with the value at its first place."""
        tensor = tensor.clone()
        tensor[(0,) * tensor.ndim] = self.value
        return tensor

    def recipe(self, norm: str = "batch") -> Recipe:
        """One stage whose loss and metric are the fault's."""

        def metric(answers: dict[str, Tensor], labels: Tensor, levels: tuple[str, ...]) -> float:
            return self.value if self.now == "metric" else negative_log_likelihood(answers, labels, levels)

        def build(model: Model, data: LabelledData) -> dict[str, Any]:
            return {"objective": Spoilt(self), "select": Select(metric, "score")}

        return one_stage(build, epochs=EPOCHS, steps_per_epoch=STEPS, norm=norm)


def first_bias(run: StageRun) -> nn.Parameter:
    """Of the backbone, before a ReLU, which hides a -inf in it from the loss."""
    return next(parameter for name, parameter in run.trained.items() if "backbone" in name and name.endswith("bias"))


class Spoilt(CrossEntropy):
    """The loss of one row is the fault's value."""

    def __init__(self, fault: Fault) -> None:
        super().__init__("fine")
        self.fault = [fault]

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        values, weights = super().forward(outputs, batch)
        return (self.fault[0].spoilt(values) if self.fault[0].now == "loss" else values), weights


@pytest.fixture(scope="module")
def undisturbed(toy_data: LabelledData, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Run]:
    """The run without a fault, of a norm and a precision."""
    done: dict[tuple[str, str], Run] = {}

    def get(norm: str, precision: str) -> Run:
        if (norm, precision) not in done:
            out = tmp_path_factory.mktemp("undisturbed") / "run"
            with pytest.MonkeyPatch.context() as patch:
                recipe = Fault("none", 0.0, None, patch).recipe(norm)
                done[norm, precision] = quick(recipe, toy_data, out, precision=precision)
        return done[norm, precision]

    return get


def check(
    case: tuple[str, str, str], norm: str, precision: str, data: LabelledData, out: Path, whole: Run, patch: Any
) -> None:
    """The whole story of one injection."""
    kind, value, moment = case
    at = MOMENTS[moment]
    epoch, step = divmod(at, STEPS)
    checkpoint_every_epoch(patch)
    fault = Fault(kind, VALUES[value], at, patch)
    with pytest.raises(DivergedError) as error:
        quick(fault.recipe(norm), data, out, precision=precision)
    assert error.value.exit_code == 4
    said = str(error.value)
    assert (
        "\n" not in said
        and "is not finite" in said
        and "stage only epoch" in said
        and ("checkpoint is kept" in said or "no checkpoint was written" in said)
    )
    if kind == "metric":
        assert said.startswith("the score is not finite")
        assert re.search(rf"stage only epoch ({epoch}|{epoch + 1})\b", said), said
    else:
        named = ("loss", "gradient") if kind == "input" else (kind,)
        assert said.startswith(tuple(f"the {name} " for name in named)), said
        first = ", ".join(map(str, fault.rows[:8]))
        assert f"in stage only epoch {epoch} step {step}, rows {first} and {len(fault.rows) - 8} more: " in said

    saved, complaints = Checkpoints(out).latest(0)
    assert complaints == [] and (saved is None) == (epoch == 0) and not (out / "stages").exists()
    if saved is not None:
        assert (saved.state["epoch"], saved.state["step"]) == (epoch, 0)
        assert saved.state["best"] == min(record["score"] for record in whole.history[:epoch])
        assert pick("best", saved.tensors) and all(tensor.isfinite().all() for tensor in saved.tensors.values())

    fault.at = None
    run = quick(fault.recipe(norm), data, out, precision=precision)
    assert_same_weights(run.model, whole.model)
    assert run.history == whole.history and whole.path is not None
    assert (out / "metrics.jsonl").read_bytes() == (whole.path / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize("case", FEW, ids="-".join)
def test_nine_injections(
    case: tuple[str, str, str],
    toy_data: LabelledData,
    tmp_path: Path,
    undisturbed: Callable[[str, str], Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    number = FEW.index(case)
    norm, precision = ("none", "batch")[number % 2], ("fp32", "bf16")[number // 2 % 2]
    check(case, norm, precision, toy_data, tmp_path / "run", undisturbed(norm, precision), monkeypatch)


@pytest.mark.long
@pytest.mark.parametrize("norm", ["none", "batch"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_every_injection(
    case: tuple[str, str, str],
    precision: str,
    norm: str,
    toy_data: LabelledData,
    tmp_path: Path,
    undisturbed: Callable[[str, str], Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check(case, norm, precision, toy_data, tmp_path / "run", undisturbed(norm, precision), monkeypatch)


def test_nine_are_a_fair_choice() -> None:
    assert len(FEW) == 9 and len(CASES) == 45
    for what, found in zip((KINDS, VALUES, MOMENTS), zip(*FEW, strict=True), strict=True):
        assert set(found) == set(what)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("value", VALUES)
def test_a_weight_that_an_update_spoils_is_never_kept(
    value: str,
    moment: str,
    toy_data: LabelledData,
    tmp_path: Path,
    undisturbed: Callable[[str, str], Run],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After the last step of an epoch no other step would notice: neither checkpoint nor best may take it."""
    checkpoint_every_epoch(monkeypatch)
    fault, whole = Fault("update", VALUES[value], None, monkeypatch), undisturbed("none", "fp32")
    epoch, spoil, step = {"first": 0, "middle": 1, "last": 2}[moment], True, StageRun.step

    def spoiling(run: StageRun, *arguments: Any) -> None:
        step(run, *arguments)
        if spoil and (run.progress.epoch, run.progress.step) == (epoch, STEPS):
            first_bias(run).data = fault.spoilt(first_bias(run).data)

    monkeypatch.setattr(StageRun, "step", spoiling)
    with pytest.raises(DivergedError, match=rf"not finite.*stage only epoch {epoch}"):
        quick(fault.recipe("none"), toy_data, tmp_path / "run")
    saved, _ = Checkpoints(tmp_path / "run").latest(0)
    assert (saved is None) == (epoch == 0) and not (tmp_path / "run" / "stages").exists()
    assert saved is None or all(tensor.isfinite().all() for tensor in saved.tensors.values())
    spoil = False
    assert_same_weights(quick(fault.recipe("none"), toy_data, tmp_path / "run").model, whole.model)


# The command ---------------------------------------------------------------------------------------------------------

DIGITS = ("train", "digits", "--method", "end-to-end", *QUICK, "--set", "epochs=3", "steps_per_epoch=4")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``DIGITS``, undisturbed."""
    run = tmp_path_factory.mktemp("whole") / "run"
    succeed(*DIGITS, "--out", run)
    return run


@pytest.mark.parametrize(("kind", "at"), [("weight", 0), ("gradient", 6), ("input", 11)])
def test_a_command_that_diverges(
    kind: str, at: int, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_every_epoch(monkeypatch)
    fault = Fault(kind, math.nan, at, monkeypatch)
    done = nestling(*DIGITS, "--out", tmp_path / "run")
    assert (done.code, done.out) == (4, ""), done.err
    assert f"is not finite in stage flat epoch {at // 4} step {at % 4}, rows " in complaint(done)
    assert not (tmp_path / "run" / "model").exists()
    fault.at = None
    done = succeed(*DIGITS, "--out", tmp_path / "run")
    assert ("resumed stage flat epoch" in done.err) == (at >= 4)
    same(tmp_path / "run", whole)


# Bad input -----------------------------------------------------------------------------------------------------------


def stop_in_the_second_epoch(out: Path, *command: object) -> list[Path]:
    """A command that a signal stops after its sixth step; its checkpoints, oldest first."""
    with pytest.MonkeyPatch.context() as patch:
        checkpoint_every_epoch(patch)
        Watch(patch).stop_at = 6
        done = nestling(*command, "--out", out)
    assert done.code == 143 and "saved" in complaint(done), done
    found = sorted((out / "checkpoints").iterdir())
    assert [folder.name for folder in found] == ["00-00001-0000000", "00-00001-0000002"]
    return found


def test_the_command_passes_over_a_damaged_checkpoint(whole: Path, tmp_path: Path) -> None:
    """One flipped bit; and a manifest of a newer format, which would be passed over as well."""
    first, second = stop_in_the_second_epoch(tmp_path / "run", *DIGITS)
    content = bytearray((second / "tensors.safetensors").read_bytes())
    content[-100] ^= 1
    (second / "tensors.safetensors").write_bytes(content)
    said = succeed(*DIGITS, "--out", tmp_path / "run").err
    assert f"{second / 'tensors.safetensors'} is damaged" in said and "falling back to the checkpoint before" in said
    assert "resumed stage flat epoch 1 step 0\n" in said and not first.exists()
    same(tmp_path / "run", whole)


def test_a_finished_stage_of_a_newer_format_is_refused(whole: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    (run / "report.html").unlink()
    manifest = run / "stages" / "00-flat" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_bytes()) | {"format": 99}))
    done = nestling(*DIGITS, "--out", run)
    assert done.code == 5 and done.out == ""
    assert "has format 99, newer than this nestling reads (1): update nestling" in complaint(done)


def test_a_checkpoint_of_another_taxonomy_is_refused(toy_data: LabelledData, tmp_path: Path) -> None:
    """As many levels, but other classes; and whoever renames a class in the data has another run."""
    paths = ("animal/bird/owl", "animal/fish/carp", "plant/tree/ash")
    taxonomy = Taxonomy.from_paths(paths)
    labels = taxonomy.encode([paths[row % 3].split("/") for row in range(len(toy_data))])
    other = replace(toy_data, taxonomy=taxonomy, labels=labels)
    recipe = one_stage(epochs=3, steps_per_epoch=4)
    for name, data in (("mine", toy_data), ("theirs", other)):
        with pytest.MonkeyPatch.context() as patch:
            Watch(patch).stop_at = 6
            with pytest.raises(Interrupted):
                quick(recipe, data, tmp_path / name)
    shutil.rmtree(tmp_path / "mine" / "checkpoints")
    shutil.copytree(tmp_path / "theirs" / "checkpoints", tmp_path / "mine" / "checkpoints")
    with pytest.raises(StorageError, match=r"does not fit this model: .* has shape") as error:
        quick(recipe, toy_data, tmp_path / "mine")
    assert error.value.exit_code == 5 and "\n" not in str(error.value)


def test_a_parquet_file_cut_short(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = [["red", "blue"][row % 2] for row in range(40)]
    parquet.write_table(pyarrow.table({"text": names, "coarse": names}), tmp_path / "whole.parquet")
    content = (tmp_path / "whole.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(content[: len(content) // 2])
    done = nestling("train", tmp_path / "cut.parquet", "--out", tmp_path / "run", *QUICK)
    assert (done.code, done.out, done.err.count("\n")) == (3, "", 1)
    assert "cut.parquet: damaged, or no Parquet file" in complaint(done)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked")
def test_a_worker_that_dies_leaves_a_run_to_go_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed as the kernel does for want of memory: one line, and the same command ends as an undisturbed one."""
    monkeypatch.setattr("nestling.data.images.MAX_TENSOR_BYTES", 0)
    source = tree(tmp_path / "data", FOUR)
    command = ("train", source, "--method", "end-to-end", *QUICK, "--workers", 1, "--set", "epochs=3", "batch_size=8")
    succeed(*command, "--out", tmp_path / "whole")
    checkpoint_every_epoch(monkeypatch)
    killed: list[int | None] = []
    original = engine_stage.StageRun.step

    def step(run: StageRun, *arguments: Any) -> None:
        if run.progress.epoch == 1 and not killed:
            for child in multiprocessing.active_children():
                killed.append(child.pid)
                child.kill()
                child.join()
        original(run, *arguments)

    monkeypatch.setattr(StageRun, "step", step)
    done = nestling(*command, "--out", tmp_path / "run")
    assert killed and (done.code, done.out) == (1, ""), done
    assert "a worker that decodes pictures died" in complaint(done)
    said = succeed(*command, "--out", tmp_path / "run").err
    assert "resumed stage flat epoch 1 step 0\n" in said
    same(tmp_path / "run", tmp_path / "whole")
