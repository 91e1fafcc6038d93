"""The only ways in which nestling writes: files and folders atomically, logs by appending.

A file written in place is unreadable after a kill in the middle; a temporary file in the *same* folder, flushed to
disk and renamed, never is.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from nestling.errors import StorageError

TEMPORARY = ".nestling-tmp-"
ASIDE = TEMPORARY + "old-"
"""Holds, under its own name, a folder that is being replaced; what mkdtemp appends to TEMPORARY has no hyphen."""


def storage_error(action: str, path: Path | str, error: OSError) -> StorageError:
    """One line for what the operating system refused, with what to do about it."""
    remedy = {
        errno.ENOSPC: "free some space and run the same command again",
        errno.EDQUOT: "free some space and run the same command again",
        errno.EFBIG: "raise the limit on file sizes and run the same command again",
        errno.EACCES: "choose a folder that you may write to",
        errno.EROFS: "choose a folder that you may write to",
        errno.EPERM: "choose a folder that you may write to",
        errno.ENOENT: "check the path",
    }.get(error.errno or 0, "check the disk and the path")
    return StorageError(f"cannot {action} {path}: {error.strerror or error}; {remedy}")


def sync_folder(folder: Path) -> None:
    """Make a rename inside ``folder`` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_write(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that becomes ``path`` whole, at the end of the block, or not at all. Raises StorageError."""
    path = Path(path)
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=TEMPORARY, dir=path.parent)
        temporary = Path(name)
        with os.fdopen(descriptor, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except StorageError:
        raise
    except OSError as error:
        raise storage_error("write", path, error) from error
    finally:
        if temporary is not None:
            with suppress(OSError):
                temporary.unlink()


def write_bytes(path: Path | str, data: bytes) -> None:
    """``data``, atomically."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: Path | str, text: str) -> None:
    """``text`` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """``value`` as indented JSON, atomically; a NaN is a bug of the caller and raises ValueError."""
    write_text(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


@contextmanager
def staged_folder(path: Path, replaces: bool) -> Iterator[Path]:
    """A folder to fill inside the block, which then becomes ``path`` whole; where the block fails nothing is left.

    ``replaces``: an older one, which otherwise stays as it is. Raises StorageError.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=TEMPORARY, dir=path.parent))
        yield temporary
        temporary.chmod(0o777 & ~_umask())
        if replaces and path.exists():
            # A folder cannot replace one that is not empty: the old one steps aside first.
            aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=path.parent))
            try:
                os.replace(path, aside / path.name)
                os.replace(temporary, path)
            except BaseException:
                with suppress(OSError):
                    _put_back(aside)
                raise
            shutil.rmtree(aside, ignore_errors=True)
        else:
            os.replace(temporary, path)
        temporary = None
        sync_folder(path.parent)
    except OSError as error:
        raise storage_error("write", path, error) from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def write_folder(path: Path | str, contents: Mapping[str, bytes]) -> None:
    """A folder of files that becomes ``path`` whole or not at all; an older one is replaced. Raises StorageError."""
    with staged_folder(Path(path), replaces=True) as folder:
        for name, data in contents.items():
            with (folder / name).open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())


def scratch_folder(parent: Path | str | None = None) -> tempfile.TemporaryDirectory[str]:
    """A folder for what is no result; it goes with the object, and after a kill with the next run in ``parent``."""
    return tempfile.TemporaryDirectory(prefix=TEMPORARY, dir=parent)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files that a killed process left in ``folder`` and below; only for who holds its lock.

    A folder that had stepped aside for one that never came is put back. Raises StorageError where it cannot be.
    """
    for leftover in list(folder.rglob(TEMPORARY + "*")):
        if leftover.is_dir() and leftover.name.startswith(ASIDE):
            try:
                _put_back(leftover)
            except OSError as error:
                raise storage_error("restore", leftover, error) from error
        elif leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _put_back(aside: Path) -> None:
    for kept in list(aside.iterdir()):
        target = aside.parent / kept.name
        if not target.exists():
            os.replace(kept, target)
    shutil.rmtree(aside, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


class Appender:
    """A text file that only grows, line by line; ``offset`` goes into the checkpoint, and a resume truncates to it."""

    def __init__(self, path: Path | str, offset: int = 0) -> None:
        self.path = Path(path)
        self.lines: list[str] = []
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                size = file.tell()
                if size < offset:
                    raise StorageError(
                        f"{self.path} is shorter ({size} bytes) than its checkpoint says ({offset}): it was cut "
                        "by another program; delete the run folder and train again"
                    )
                file.truncate(offset)
        except OSError as error:
            raise storage_error("write", self.path, error) from error
        self.offset = offset

    def append(self, record: dict[str, Any]) -> None:
        """Remember one JSON line; it reaches the disk at the next ``flush``."""
        self.lines.append(json.dumps(record, allow_nan=False) + "\n")

    def append_text(self, text: str) -> None:
        """Remember whole lines, each with its end, as they are."""
        self.lines.append(text)

    def flush(self, sync: bool = False) -> int:
        """Write what is remembered (to the platter with ``sync``) and return the offset behind it."""
        data = "".join(self.lines).encode()
        try:
            with self.path.open("ab") as file:
                if data:
                    file.write(data)
                    file.flush()
                if sync:
                    os.fsync(file.fileno())
        except OSError as error:
            with suppress(OSError):
                os.truncate(self.path, self.offset)
            raise storage_error("write", self.path, error) from error
        self.lines.clear()
        self.offset += len(data)
        return self.offset


def remove(path: Path | str) -> None:
    """Delete a file, where it is. Raises StorageError."""
    try:
        Path(path).unlink(missing_ok=True)
    except OSError as error:
        raise storage_error("delete", path, error) from error


def read_lines(path: Path | str) -> list[dict[str, Any]]:
    """The records of an appended file; a torn last line is left out."""
    records = []
    for line in Path(path).read_bytes().split(b"\n"):
        with suppress(ValueError):
            records.append(json.loads(line))
    return records


def reserve_file(path: Path | str, size: int) -> None:
    """A file of so many bytes, all of which are on the disk. Raises OSError where it has no room for them."""
    if sys.platform == "darwin":
        raise OSError(errno.ENOTSUP, "cannot reserve room on the disks of this system")
    with Path(path).open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def copy_tree(path: Path | str, copies: Iterable[tuple[str, Path]]) -> None:
    """A new folder of copies, (name below it, file), that becomes ``path`` whole or not at all. Raises StorageError."""
    with staged_folder(Path(path), replaces=False) as folder:
        for name, source in copies:
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with source.open("rb") as given, target.open("wb") as file:
                shutil.copyfileobj(given, file)
                file.flush()
                os.fsync(file.fileno())
