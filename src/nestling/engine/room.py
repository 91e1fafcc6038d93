"""Where kept maps lie: on the device, in memory, or in a file. Every process of a run takes the same kind of place."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
from torch import Tensor

from nestling import collective
from nestling.files import reserve_file, scratch_folder

SHARE = 0.5
"""Of the memory or disk that is free, which the kept maps of all processes of a machine may fill."""
PLACES = {
    "device": "on the device",
    "memory": "of memory",
    "disk": "on disk, more than half of the free memory",
}


class NoRoom(Exception):
    """There is no place for the maps; a run goes on without keeping them."""


def choose(size: int, device: torch.device, folder: Path | None) -> str | None:
    """The first of ``PLACES`` with room for so many bytes of each process; None where there is none."""
    if device.type == "cuda" and size < SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    # The processes of a machine share its memory and its disk.
    size *= max(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), 1)
    if size < SHARE * free_memory():
        return "memory"
    return "disk" if size < SHARE * free_disk(folder) else None


def reserve(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, folder: Path | None
) -> tuple[Tensor, str]:
    """An empty tensor of this shape, and its place in words, as the first process chooses.

    Raises NoRoom, on all processes, where one of them is refused the room.
    """
    size = math.prod(shape) * dtype.itemsize
    amount = f"{math.ceil(size / 2**20):,} MiB"
    place = collective.of_first(lambda: choose(size, device, folder))
    if place is None:
        raise NoRoom(f"{amount} are more than half of what is free in memory and on disk")
    maps, refused = None, "another process has no room"
    try:
        if place == "disk":
            maps = in_file(shape, dtype, folder)
        else:
            maps = torch.empty(shape, dtype=dtype, device=device if place == "device" else "cpu")
    except (OSError, RuntimeError) as error:
        refused = str(error).splitlines()[0]
    if collective.all_max([int(maps is None)], device)[0] or maps is None:
        raise NoRoom(f"{amount} {PLACES[place]}: {refused}")
    return maps, f"{amount} {PLACES[place]}"


def in_file(shape: tuple[int, ...], dtype: torch.dtype, folder: Path | None) -> Tensor:
    """An empty tensor in a file without a name. Raises OSError or RuntimeError where the disk has no room."""
    size = math.prod(shape)
    # The mapping outlives the file's name: however a run ends, the room is given back.
    with scratch_folder(folder) as name:
        path = Path(name) / "maps"
        # A disk that fills up under a file with holes would kill the process.
        reserve_file(path, size * dtype.itemsize)
        return torch.from_file(str(path), shared=True, size=size, dtype=dtype).view(shape)


def free_memory() -> int:
    """Bytes that programs could still take."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 2 * 2**30


def free_disk(folder: Path | None) -> int:
    """Bytes on the disk of a folder, which need not be there yet."""
    folder = (folder or Path(tempfile.gettempdir())).absolute()
    try:
        return shutil.disk_usage(next(path for path in (folder, *folder.parents) if path.exists())).free
    except OSError:
        return 0
