"""Where kept maps lie: as much as there is room for, of all processes, and as the first of them says."""

from __future__ import annotations

import resource
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from layers import VIEWS, full, layers_of, recipe, train
from nestling import collective
from nestling.data.dataset import LabelledData
from nestling.engine import room
from nestling.engine.room import NoRoom
from nestling.errors import Interrupted
from nestling.files import reserve_file
from small import Watch, assert_same_weights


def test_processes_share_a_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    full(monkeypatch, 10_000)
    monkeypatch.setattr(room, "free_memory", lambda: 1000)
    cpu = torch.device("cpu")

    def chosen(size: int, processes: str) -> str | None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        return room.choose(size, cpu, tmp_path / "not yet" / "there")

    assert [chosen(400, n) for n in ("1", "2", "12", "13")] == ["memory", "disk", "disk", None]
    assert chosen(499, "1") == "memory" and chosen(500, "1") == "disk"


def test_the_first_process_chooses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """This one would take memory, where there is enough of it; and what one is refused, none takes."""
    shape, cpu = (2, 3, 3, 4), torch.device("cpu")
    assert room.reserve(shape, torch.float32, cpu, tmp_path)[1] == "1 MiB of memory"
    monkeypatch.setattr(collective, "of_first", lambda read: "disk")
    maps, place = room.reserve(shape, torch.float32, cpu, tmp_path)
    assert maps.shape == shape and "on disk" in place
    monkeypatch.setattr(collective, "of_first", lambda read: None)
    with pytest.raises(NoRoom, match="more than half"):
        room.reserve(shape, torch.float32, cpu, tmp_path)
    monkeypatch.setattr(collective, "of_first", lambda read: "memory")
    monkeypatch.setattr(collective, "all_max", lambda values, device: [1])
    with pytest.raises(NoRoom, match="another process has no room"):
        room.reserve(shape, torch.float32, cpu, tmp_path)


def test_room_on_disk_is_reserved(tmp_path: Path) -> None:
    """A file with holes ends the process by a signal, once the disk is full."""
    reserve_file(tmp_path / "maps", 1_000_000)
    found = (tmp_path / "maps").stat()
    assert found.st_size == 1_000_000 and found.st_blocks * 512 >= 1_000_000


@pytest.fixture
def small_files() -> Iterator[None]:
    """Files may not grow past 20 kB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("small_files")
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, 10**9)
    wanted = (100, 3, 3, 40), torch.float32, torch.device("cpu"), tmp_path
    with pytest.raises(NoRoom, match=r"on disk.*File too large"):
        room.reserve(*wanted)
    monkeypatch.setattr(room, "reserve_file", lambda path, size: None)
    with pytest.raises(NoRoom, match="1 MiB on disk"):
        room.reserve(*wanted)
    assert list(tmp_path.iterdir()) == []


def test_what_was_decided_is_kept(
    toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A resume that has more room goes on without kept maps, so that the weights are those of an unbroken run."""
    expected = layers_of(train(recipe(keep_features=False, **VIEWS), toy_data))
    watch = Watch(monkeypatch)
    watch.stop_at = 40  # Of layer 2, whose steps are the second 32.
    original = room.free_memory, room.shutil.disk_usage
    full(monkeypatch, 1000)
    with pytest.raises(Interrupted):
        train(recipe(**VIEWS), toy_data, tmp_path / "run")
    watch.stop_at = None
    monkeypatch.setattr(room, "free_memory", original[0])
    monkeypatch.setattr(room.shutil, "disk_usage", original[1])
    run = train(recipe(**VIEWS), toy_data, tmp_path / "run", verbose=True)
    said = capsys.readouterr().err
    assert "features of layer-2: not kept (as the run began)" in said
    assert "features of layer-3: kept (1 MiB of memory, computed once for 192 rows)" in said
    derived = tomllib.loads((tmp_path / "run" / "recipe.toml").read_text())["derived"]
    assert [derived[f"features of layer-{j}"]["value"] for j in (2, 3)] == ["not kept", "kept"]
    assert "more than half" in derived["features of layer-2"]["reason"]
    for block in (0, 1):
        assert_same_weights(layers_of(run).blocks[block], expected.blocks[block])
