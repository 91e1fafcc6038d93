"""Pictures beyond memory: decoded ahead by workers, in order, read on demand, and no way to hang."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from nestling import collective
from nestling.commands.pipeline import fingerprint
from nestling.data import LabelledData, LazyImages, images, load_data, stream
from nestling.data.inputs import Inputs, Listed, Packed, inputs_of
from nestling.data.loader import DeviceData
from nestling.data.stream import Ahead, choose_workers, in_parts
from nestling.data.transforms import Preprocessing
from nestling.engine.checkpoint import Checkpoints
from nestling.engine.stage import StageRun
from nestling.errors import DataError, Interrupted, NestlingError, StorageError, UsageError
from nestling.lock import RunLock
from running import FOUR, QUICK, refuse, succeed, tree
from small import RECIPES, Watch, assert_same_weights, one_stage, quick

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks at processes under /proc")


@pytest.fixture(scope="module")
def files(toy_data: LabelledData, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The pictures of ``toy_data``, a PNG each."""
    folder = tmp_path_factory.mktemp("pictures")
    paths = [folder / f"{row}.png" for row in range(len(toy_data))]
    for path, pixels in zip(paths, toy_data.images(np.arange(len(toy_data))), strict=True):
        Image.fromarray(pixels[0].numpy()).save(path)
    return paths


@pytest.fixture
def lazy(toy_data: LabelledData, files: list[Path]) -> LabelledData:
    """``toy_data``, decoded on access."""
    return replace(toy_data, inputs=LazyImages(Packed(files), [path.name for path in files], (8, 8), 1))


@pytest.fixture(autouse=True)
def no_worker_stays() -> Iterator[None]:
    yield
    assert not multiprocessing.active_children()


def lazy_images(data: LabelledData) -> LazyImages:
    assert isinstance(data.inputs, LazyImages)
    return data.inputs


# Order -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_batches_come_in_the_order_asked(workers: int, lazy: LabelledData, toy_data: LabelledData) -> None:
    generator = np.random.default_rng(0)
    batches = [generator.integers(0, 240, size) for size in (5, 1, 0, 64, 64, 3, 240)]
    before = torch.get_rng_state()
    with Ahead(lazy_images(lazy), iter(batches), workers) as ahead:
        for rows, pixels in zip(batches, ahead, strict=True):
            assert torch.equal(pixels, toy_data.images(rows))
    assert torch.equal(torch.get_rng_state(), before), "the run's random numbers depend on how it decodes"


def test_batches_are_asked_for_as_workers_come_to_them(lazy: LabelledData) -> None:
    asked = []

    def batches() -> Iterator[np.ndarray]:
        for number in range(1000):
            asked.append(number)
            yield np.array([number % 240])

    with Ahead(lazy_images(lazy), batches(), 2) as ahead:
        for _ in range(3):
            next(ahead)
    assert len(asked) <= 3 + 2 * stream.PREFETCH


def test_without_room_in_shared_memory(
    lazy: LabelledData, toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container with 64 MiB of it: a worker that writes more is killed."""
    status = os.statvfs("/")
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result((*status[:4], 1, *status[5:])))
    with Ahead(lazy_images(lazy), [np.arange(90), np.arange(5, 50)], 1) as ahead:
        assert torch.equal(torch.cat(list(ahead)), toy_data.images(np.array([*range(90), *range(5, 50)])))
    run = quick(RECIPES["end-to-end"], lazy, workers=3)
    assert ("workers", 0, "shared memory, /dev/shm, has no room for their batches") in run.decisions


def test_statistics_of_parts_are_those_of_the_whole(lazy: LabelledData, toy_data: LabelledData) -> None:
    whole = Preprocessing.from_data(toy_data.images(np.arange(240)))
    assert Preprocessing.from_data(in_parts(lazy_images(lazy), np.arange(240), 1, num_rows=100)) == whole
    with pytest.raises(UsageError, match="at least one; got none"):
        Preprocessing.from_data([])


# Runs --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "numbers"), [("nested", (0, 1, 2)), ("end-to-end", (2,))])
def test_weights_do_not_depend_on_the_workers(
    method: str, numbers: tuple[int, ...], toy_data: LabelledData, lazy: LabelledData
) -> None:
    """Nor on whether the pictures are in memory: bit for bit, with augmentation, validation and all stages."""
    expected = quick(RECIPES[method], toy_data)
    for workers in numbers:
        run = quick(RECIPES[method], lazy, workers=workers)
        assert_same_weights(run.model, expected.model)
        assert run.history == expected.history and run.metrics == expected.metrics
        assert run.preprocessing == expected.preprocessing
        assert ("workers", workers, "as given") in run.decisions
    assert ("workers", 0, "the pictures are in memory") in expected.decisions


@pytest.mark.parametrize("method", ["nested", "end-to-end"])
def test_a_resume_in_the_middle_of_an_epoch(
    method: str, lazy: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped twice, with another number of workers each time."""
    expected = quick(RECIPES[method], lazy, tmp_path / "whole", workers=0)
    watch = Watch(monkeypatch)
    for stop, workers in ((4, 2), (13, 1)):
        watch.stop_at = stop
        with pytest.raises(Interrupted):
            quick(RECIPES[method], lazy, tmp_path / "broken", workers=workers)
        assert not multiprocessing.active_children()
    watch.stop_at = None
    run = quick(RECIPES[method], lazy, tmp_path / "broken", workers=2)
    assert_same_weights(run.model, expected.model)
    assert run.history == expected.history
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "broken")]
    assert logs[0] == logs[1]


def test_every_process_decodes_its_own_part(lazy: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "world_size", lambda: 2)
    monkeypatch.setattr(collective, "rank", lambda: 1)
    found = []

    def to_come(run: StageRun, order: Any) -> Iterator[np.ndarray]:
        run.progress.epoch, run.progress.step = 1, 2
        batches = list(original(run, order))
        assert len(batches) == 3 * order.steps - (order.steps + 2)
        for number, rows in enumerate(batches, start=order.steps + 2):
            assert np.array_equal(rows, run.rows[order.batch(*divmod(number, order.steps))[0][1::2]])
        found.append(len(batches))
        raise Interrupted(15, "enough")

    original = StageRun.to_come
    monkeypatch.setattr(StageRun, "to_come", to_come)
    with pytest.raises(Interrupted):
        quick(RECIPES["end-to-end"], lazy, workers=0)
    assert found


# What goes wrong ---------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(lazy: LabelledData, files: list[Path], tmp_path: Path) -> LabelledData:
    """``lazy`` with a picture cut short after the header, one that is no picture and one that is gone."""
    paths = list(files)
    for row, content in ((40, files[40].read_bytes()[:60]), (100, b"no picture")):
        paths[row] = tmp_path / f"bad-{row}.png"
        paths[row].write_bytes(content)
    paths[200] = tmp_path / "bad-200.png"
    return replace(lazy, inputs=LazyImages(Packed(paths), [path.name for path in paths], (8, 8), 1))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize(
    ("row", "reason"), [(40, "cannot be read as a picture"), (100, "is no picture"), (200, "there is no such file")]
)
def test_a_bad_picture_is_named(workers: int, row: int, reason: str, damaged: LabelledData) -> None:
    batches = [np.arange(9), np.array([3, row, 5]), np.arange(9)]
    with Ahead(lazy_images(damaged), batches, workers) as ahead:
        assert len(next(ahead)) == 9
        with pytest.raises(DataError, match=rf"^bad-{row}\.png: {reason}[^\n]*$"):
            next(ahead)


def test_a_run_stops_at_a_bad_picture(damaged: LabelledData, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"^bad-\d+\.png: "):
        quick(RECIPES["end-to-end"], damaged, tmp_path / "run", workers=2)


def test_the_command_names_a_bad_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found in training, since on access nothing is decoded before."""
    monkeypatch.setattr(images, "MAX_TENSOR_BYTES", 0)
    folder = tree(tmp_path / "data", FOUR)
    options = (*QUICK, "--workers", "1", "--device", "cpu", "--out", tmp_path / "run")
    bad = folder / "red" / "a" / "3.png"
    bad.write_bytes(bad.read_bytes()[:90])
    done = [line for line in run_lines(3, "train", folder, *options) if line.startswith("nestling: ")]
    assert len(done) == 1 and done[0].startswith(f"nestling: {bad}: cannot be read as a picture: ")
    assert done[0].endswith("--on-bad-image skip leaves such pictures out")
    said = succeed("train", folder, *options, "--on-bad-image", "skip", "--out", tmp_path / "skip").err
    assert "workers: 1 (as given)" in said and "left out, because unreadable: 1 of" in said


def run_lines(code: int, *arguments: object) -> list[str]:
    from running import nestling

    done = nestling(*arguments)
    assert done.code == code and "Traceback" not in done.err, done.err
    return done.err.splitlines()


@LINUX
def test_a_worker_that_is_killed(lazy: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the kernel, for want of memory; the process that trains is waiting for it."""

    def decode(*arguments: object) -> np.ndarray:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    monkeypatch.setattr(stream, "decode", decode)
    with pytest.raises(NestlingError, match=r"^a worker that decodes pictures died.*fewer --workers.*pid") as error:
        quick(RECIPES["end-to-end"], lazy, workers=2)
    # Of several processes, whoever it was says so.
    assert error.value.exit_code == 1 and not error.value.of_all


@LINUX
def test_a_worker_that_is_killed_during_a_step(lazy: LabelledData, tmp_path: Path) -> None:
    """The step is taken to its end; what the dead worker had sent cannot be had any more."""
    steps = []

    def perturb(loss: Any, batch: Any) -> Any:
        for child in multiprocessing.active_children():
            child.kill()
        steps.append(len(batch.index))
        return batch

    with pytest.raises(NestlingError, match=r"^a worker that decodes pictures died"):
        quick(one_stage(lambda model, data: {"perturb": perturb}), lazy, tmp_path / "run", workers=1)
    assert len(steps) == 1


@LINUX
def test_workers_that_cannot_be_started(lazy: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    def fork() -> int:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(NestlingError, match=r"cannot start 2 workers \(Cannot allocate memory\): give fewer"):
        quick(RECIPES["end-to-end"], lazy, workers=2)


TRAIN = """
import sys
from nestling import interrupt
interrupt.install()
import nestling.data.images
from nestling.__main__ import main
nestling.data.images.MAX_TENSOR_BYTES = 0
main(sys.argv[1:])
"""


class Training:
    """``nestling train`` on a folder, with two workers, in a session of its own; entered when it takes steps."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "run"
        self.data = folder / "data" if (folder / "data").exists() else tree(folder / "data", FOUR)
        options = ("--backbone", "conv:4/8", "--precision", "fp32", "--device", "cpu", "--workers", "2")
        fields = ("--set", "epochs=100000", "steps_per_epoch=5", "batch_size=8", "--method", "end-to-end")
        command = [sys.executable, "-c", TRAIN, "train", str(self.data), *options, *fields, "--out", str(self.out)]
        self.process = subprocess.Popen(
            command,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def __enter__(self) -> Training:
        until = time.monotonic() + 120
        while not list(self.out.glob("checkpoints/*/*")):
            assert self.process.poll() is None and time.monotonic() < until, self.process.communicate()
            time.sleep(0.05)
        self.workers = children(self.process.pid)
        assert len(self.workers) >= 2
        return self

    def __exit__(self, *error: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def wait_for(condition: Any, seconds: float = 30) -> bool:
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


@LINUX
def test_workers_go_with_a_killed_training_and_hold_no_lock(tmp_path: Path) -> None:
    with Training(tmp_path) as training:
        for worker in training.workers:
            held = {str(link.resolve()) for link in Path(f"/proc/{worker}/fd").iterdir()}
            assert str(training.out / "run.lock") not in held
            # Stopped, they cannot end by themselves: the lock must be free all the same.
            os.kill(worker, signal.SIGSTOP)
        training.process.kill()
        training.process.wait()
        with RunLock(training.out):
            assert any(alive(worker) for worker in training.workers)
        for worker in training.workers:
            os.kill(worker, signal.SIGCONT)
        assert wait_for(lambda: not any(alive(worker) for worker in training.workers))


@LINUX
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_to_all_processes_is_the_trainings_to_obey(number: int, code: int, tmp_path: Path) -> None:
    """As a terminal and a service manager send it: saved, and no worker missed."""
    with Training(tmp_path) as training:
        os.killpg(training.process.pid, number)
        _, said = training.process.communicate(timeout=60)
        assert training.process.returncode == code, said
        assert "saved: the same command goes on from here" in said and "Traceback" not in said
        assert wait_for(lambda: not any(alive(worker) for worker in training.workers))


# How many ----------------------------------------------------------------------------------------------------------


def test_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    chosen = {}
    for cores in (1, 2, 6, 64):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        chosen[cores], reason = choose_workers()
        assert reason == f"{cores} cores: all but one, at most 8"
    assert chosen == {1: 0, 2: 1, 6: 5, 64: 8}
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "16")
    assert choose_workers() == (3, "64 cores for 16 processes: all but one, at most 8")
    assert choose_workers(12) == (12, "as given")
    with pytest.raises(UsageError, match=r"must be at least 0, got -1"):
        choose_workers(-1)


def test_an_impossible_number_of_workers_is_refused(toy_data: LabelledData, tmp_path: Path) -> None:
    refuse(2, ["number of workers", "-1"], "train", "digits", "--workers", "-1", "--out", tmp_path / "run")
    refuse(2, ["--workers must be an integer"], "train", "digits", "--workers", "two", "--out", tmp_path / "run")
    with pytest.raises(UsageError, match="number of workers"):
        quick(RECIPES["end-to-end"], toy_data, tmp_path / "run", workers=-1)
    assert not (tmp_path / "run").exists()


# On demand ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def shards(toy_data: LabelledData, files: list[Path], tmp_path: Path) -> Path:
    """``toy_data`` as two files to train, in row groups of 16, and one to test."""
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    levels = toy_data.taxonomy.levels
    names = [
        [toy_data.taxonomy.classes[level][code] for code in toy_data.labels[:, number]]
        for number, level in enumerate(levels)
    ]
    folder = tmp_path / "toy"
    folder.mkdir()
    parts = {"train-00000-of-00002": range(100), "train-00001-of-00002": range(100, 200), "test": range(200, 240)}
    for name, rows in parts.items():
        pictures = [{"bytes": files[row].read_bytes(), "path": None} for row in rows]
        columns = {level: [column[row] for row in rows] for level, column in zip(levels, names, strict=True)}
        table = pyarrow.table({"image": pictures, **columns})
        parquet.write_table(table, folder / f"{name}.parquet", row_group_size=16)
    return folder


@pytest.fixture
def on_demand(shards: Path, monkeypatch: pytest.MonkeyPatch) -> LabelledData:
    """The training rows, with nothing held."""
    monkeypatch.setattr(images, "MAX_TENSOR_BYTES", 1000)
    monkeypatch.setattr(images, "MAX_HELD_BYTES", 1000)
    return load_data(shards)


def test_rows_of_shards_are_read_on_demand(on_demand: LabelledData, toy_data: LabelledData, shards: Path) -> None:
    found = lazy_images(on_demand)
    assert not found.inputs.in_memory
    assert any(note.startswith("read on demand") for note in on_demand.notes)
    assert found.shape == (200, 1, 8, 8)
    rows = np.random.default_rng(0).permutation(200)
    assert torch.equal(found.take(rows), toy_data.images(rows))
    part = on_demand.subset(rows).subset(np.arange(50, 90))
    batches = [np.arange(20), np.array([39, 0, 0])]
    with Ahead(lazy_images(part), batches, 2) as ahead:
        for batch, pixels in zip(batches, ahead, strict=True):
            assert torch.equal(pixels, toy_data.images(rows[50:90][batch]))
    every = load_data(shards, "all")
    assert torch.equal(lazy_images(every).take(np.arange(240)), toy_data.images(np.arange(240)))


def test_what_goes_to_a_worker_is_an_index(
    on_demand: LabelledData, shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the bytes are held, and after they were read."""
    found = lazy_images(on_demand).inputs
    found.read(np.arange(200))
    assert len(pickle.dumps(found)) < 4000
    monkeypatch.setattr(images, "MAX_HELD_BYTES", 1 << 20)
    held = lazy_images(load_data(shards)).inputs
    assert held.in_memory
    assert len(pickle.dumps(held)) < 4000
    other = pickle.loads(pickle.dumps(held))
    rows = np.array([199, 3, 100])
    assert other.read(rows) == held.read(rows) == found.read(rows)
    assert not other.in_memory


def test_training_on_demand(on_demand: LabelledData, toy_data: LabelledData, shards: Path) -> None:
    expected = quick(RECIPES["end-to-end"], toy_data.subset(range(200)))
    run = quick(RECIPES["end-to-end"], on_demand, workers=2)
    assert_same_weights(run.model, expected.model)
    # A resume knows the data again without reading them.
    assert fingerprint([on_demand]) == fingerprint([load_data(shards)])
    assert fingerprint([on_demand]) != fingerprint([load_data(shards, "test")])


def test_row_groups_too_large_for_single_rows(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nestling.data.parquet.MAX_GROUP_BYTES", 100)
    assert isinstance(load_data(shards).inputs, torch.Tensor)
    monkeypatch.setattr(images, "MAX_HELD_BYTES", 1000)
    with pytest.raises(DataError, match=r"00000-of-00002.parquet: its row group 0 holds .*row_group_size=100"):
        load_data(shards)


def test_few_row_groups_are_kept(on_demand: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: Any = lazy_images(on_demand).inputs
    reader = getattr(inputs, "of", inputs)
    reader.kept.clear()
    monkeypatch.setattr("nestling.data.parquet.CACHE_BYTES", int(3.5 * reader.index[0, 3]))
    for row in range(0, 200, 16):
        inputs.read(np.array([row]))
        assert 1 <= len(reader.kept) <= 4
    assert list(reader.kept) == sorted(reader.kept)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_changes_under_a_run(workers: int, on_demand: LabelledData, shards: Path) -> None:
    shard = shards / "train-00001-of-00002.parquet"
    content = shard.read_bytes()
    lazy_images(on_demand).inputs.read(np.arange(100))
    fresh = pickle.loads(pickle.dumps(lazy_images(on_demand)))
    shard.write_bytes(content[: len(content) // 2])
    rows = [np.arange(150, 160)]
    with Ahead(fresh, rows, workers) as ahead, pytest.raises(DataError, match=r"00001-of-00002.parquet: damaged"):
        next(ahead)
    shard.unlink()
    with Ahead(fresh, rows, workers) as ahead, pytest.raises(StorageError, match=r"cannot read .*00001-of-00002"):
        next(ahead)


@pytest.mark.parametrize("kind", ["packed", "listed", "selected", "joined"])
def test_inputs(kind: str, files: list[Path]) -> None:
    encoded = [path.read_bytes() for path in files[:5]]
    values = [encoded[0], files[1], None, encoded[3], files[4]]
    made: dict[str, Inputs] = {
        "packed": Packed(values),
        "listed": Listed(values),
        "selected": inputs_of([*values[::-1], b"x"]).select(np.array([5, 4, 3, 2, 1, 0])).select(np.arange(1, 6)),
    }
    made["joined"] = pickle.loads(pickle.dumps(collected := joined(values)))
    assert collected.in_memory
    inputs = made[kind]
    rows = np.array([4, 0, 2, 0, 1])
    assert len(inputs) == 5 and inputs.in_memory and inputs.obstacle() is None
    assert inputs.hold(0) is inputs
    assert inputs.read(rows) == [values[row] for row in rows]
    assert inputs.read(rows[:0]) == []
    sizes = [-1 if value is None else len(encoded[row]) for row, value in enumerate(values)]
    assert inputs.sizes(rows).tolist() == [sizes[row] for row in rows]
    assert [raw for _, raws in inputs.blocks() for raw in raws] == values
    assert pickle.loads(pickle.dumps(inputs)).read(rows) == inputs.read(rows)


def joined(values: list[Any]) -> Inputs:
    from nestling.data.inputs import Joined

    return Joined([Packed(values[:2]), Listed(values[2:])])


def test_paths_take_little_room_on_their_way_to_a_worker() -> None:
    paths = [Path(f"/data/train/class-{row % 100}/picture-{row}.jpeg") for row in range(10_000)]
    assert len(pickle.dumps(Packed(paths))) < 10_000 * 60


def test_a_picture_is_decoded_where_it_is_not_ahead(lazy: LabelledData, toy_data: LabelledData) -> None:
    preprocessing = Preprocessing.from_data(toy_data.images(np.arange(240)))
    device = torch.device("cpu")
    rows = np.array([5, 200])
    plain = DeviceData(toy_data, preprocessing, device)
    streamed = DeviceData(lazy, preprocessing, device)
    expected = plain.batch(rows).inputs
    assert torch.equal(streamed.batch(rows).inputs, expected)
    assert torch.equal(streamed.batch(rows, images=toy_data.images(rows)).inputs, expected)
    with plain.ahead([rows], 2) as ahead:
        assert next(ahead) is None


def test_a_worker_that_dies_of_the_signal_is_no_fault(
    tmp_path: Path, toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training obeys the signal, and saves, though its next batch does not come; without a signal it is a fault."""
    from nestling.engine.stage import StageRun
    from nestling.errors import Interrupted, LostError

    calls = [0]
    original = StageRun.step

    def step(run: StageRun, *arguments: Any) -> None:
        calls[0] += 1
        if calls[0] == 4:
            raise LostError("a worker that decodes pictures died")
        original(run, *arguments)

    monkeypatch.setattr(StageRun, "step", step)
    with pytest.raises(LostError, match="a worker"):
        quick(one_stage(steps_per_epoch=2), toy_data, tmp_path / "fault")
    calls[0] = 0
    monkeypatch.setattr("nestling.interrupt.received", lambda: 15 if calls[0] >= 4 else None)
    with pytest.raises(Interrupted, match="saved: the same command goes on"):
        quick(one_stage(steps_per_epoch=2), toy_data, tmp_path / "run")
    saved, _ = Checkpoints(tmp_path / "run").latest(0)
    assert saved is not None and (saved.state["epoch"], saved.state["step"]) == (1, 1)
