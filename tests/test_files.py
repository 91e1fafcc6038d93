"""Writing that is whole or not at all: broken off, on a full disk, and with several writers."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from nestling import files
from nestling.errors import BusyError, StorageError
from nestling.files import (
    TEMPORARY,
    Appender,
    atomic_write,
    read_lines,
    remove_leftovers,
    write_bytes,
    write_folder,
    write_json,
    write_text,
)
from nestling.lock import RunLock
from running import leftovers


def listing(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def run_python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The code in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


# Whole files ---------------------------------------------------------------------------------------------------------


def test_files_are_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "file"
    write_bytes(path, b"\x00one")
    assert path.read_bytes() == b"\x00one"
    write_text(path, "zwei ☃\n")
    assert path.read_text(encoding="utf-8") == "zwei ☃\n"
    write_json(path, {"a": [1, None, "ü"]})
    assert json.loads(path.read_text(encoding="utf-8")) == {"a": [1, None, "ü"]}
    assert "ü" in path.read_text(encoding="utf-8")
    assert leftovers(tmp_path) == []


def test_the_mask_for_new_files_is_kept(tmp_path: Path) -> None:
    """mkstemp makes files that nobody else may read; what becomes of them is what open() would have made."""
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "file", "x")
        write_folder(tmp_path / "folder", {"a": b"x"})
        assert os.umask(0o027) == 0o027, "the mask was changed"
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


class Stop(BaseException):
    """As KeyboardInterrupt and the like: nothing catches it on the way."""


def break_off(path: Path, error: BaseException) -> None:
    with atomic_write(path) as file:
        file.write(b"half of the ne")
        file.flush()
        raise error


@pytest.mark.parametrize("error", [ValueError("mine"), Stop(), StorageError("already said"), OSError(28, "No space")])
def test_a_write_broken_off_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    expected = StorageError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        break_off(path, error)
    assert path.read_text() == "old" and listing(tmp_path) == ["file"]
    if not isinstance(error, OSError) or isinstance(error, StorageError):
        assert caught.value is error


def test_a_first_write_broken_off_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Stop):
        break_off(tmp_path / "file", Stop())
    assert listing(tmp_path) == []


def test_readers_see_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new"


def test_the_temporary_file_is_in_the_same_folder_and_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rename across file systems is a copy, and a rename before the data are on the disk may name an empty file."""
    done: list[str] = []
    real = {name: getattr(os, name) for name in ("fsync", "replace")}

    def fsync(descriptor: int) -> None:
        done.append("sync folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "sync file")
        real["fsync"](descriptor)

    def replace(source: Path, target: Path) -> None:
        assert Path(source).parent == Path(target).parent == tmp_path
        done.append("rename")
        real["replace"](source, target)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", replace)
    write_text(tmp_path / "file", "x")
    assert done == ["sync file", "rename", "sync folder"]
    done.clear()
    write_folder(tmp_path / "folder", {"a": b"1", "b": b"2"})
    assert done == ["sync file", "sync file", "rename", "sync folder"]


def test_json_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "file", {"x": float("nan")})
    assert listing(tmp_path) == []


def test_what_the_system_refuses_is_one_line_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(StorageError, match=r"cannot write .*file/below: .*; check") as error:
        write_text(tmp_path / "file" / "below", "x")
    assert "\n" not in str(error.value) and error.value.exit_code == 5
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match="Is a directory"):
        write_text(tmp_path / "folder", "x")
    assert leftovers(tmp_path) == []


FORBIDDEN = """
    import os, sys
    from nestling.errors import StorageError
    from nestling.files import Appender, write_folder, write_text
    from nestling.lock import RunLock

    if os.geteuid() == 0:
        os.setuid(65534)
    target = "/nestling-test-of-permissions"
    for write in (
        lambda: write_text(target, "x"),
        lambda: write_folder(target, {"a": b"x"}),
        lambda: write_text(target + "/run/file", "x"),
        lambda: Appender(target),
        lambda: RunLock(target).__enter__(),
    ):
        try:
            write()
        except StorageError as error:
            print(error)
"""


def test_no_permission() -> None:
    """As nobody, in the root of the file system."""
    done = run_python(FORBIDDEN)
    said = done.stdout.splitlines()
    assert len(said) == 5, done.stdout + done.stderr
    for line in said:
        assert line.startswith("cannot write /nestling-test-of-permissions")
        assert line.endswith(": Permission denied; choose a folder that you may write to")


# Folders -------------------------------------------------------------------------------------------------------------


def test_folders_are_replaced_whole(tmp_path: Path) -> None:
    write_folder(tmp_path / "a" / "b", {"x": b"1", "y": b"2"})
    write_folder(tmp_path / "a" / "b", {"z": b"3"})
    assert {p.name: p.read_bytes() for p in (tmp_path / "a" / "b").iterdir()} == {"z": b"3"}
    assert listing(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_folder_broken_off_leaves_the_old_one(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every file of it; an error of the system is ours."""
    write_folder(tmp_path / "f", {"x": b"old"})
    calls, real = 0, os.fsync

    def fsync(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            raise OSError(28, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(StorageError, match="No space left on device; free some space and run the same command again"):
        write_folder(tmp_path / "f", {"a": b"1", "b": b"2", "c": b"3"})
    assert {p.name: p.read_bytes() for p in (tmp_path / "f").iterdir()} == {"x": b"old"}
    assert listing(tmp_path) == ["f"]


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "f", {"x": b"old"})
    calls, real = 0, os.replace

    def replace(source: Path, target: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(5, "Input/output error")
        real(source, target)

    monkeypatch.setattr(files.os, "replace", replace)
    with pytest.raises(StorageError, match="Input/output error"):
        write_folder(tmp_path / "f", {"x": b"new"})
    assert contents(tmp_path / "f") == {"x": b"old"}
    assert listing(tmp_path) == ["f"]


REPLACED = """
    import os, sys
    from pathlib import Path
    from nestling import files

    calls, real = 0, os.replace
    def replace(source, target):
        global calls
        calls += 1
        if calls == int(sys.argv[2]):
            os._exit(9)
        real(source, target)
    files.os.replace = replace
    files.write_folder(Path(sys.argv[1]), {"x": b"new"})
"""


@pytest.mark.parametrize("call", [1, 2, 3])
def test_a_kill_between_the_renames_loses_no_folder(call: int, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "f"
    write_folder(target, {"x": b"old"})
    assert run_python(REPLACED, str(target), str(call)).returncode == (9 if call < 3 else 0)
    assert target.exists() == (call != 2)
    remove_leftovers(tmp_path)
    assert contents(target) == {"x": b"old" if call < 3 else b"new"}
    assert listing(tmp_path / "deep") == ["f"]


def test_leftovers_are_removed_wherever_they_are(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / f"{TEMPORARY}file").write_text("x")
    (tmp_path / f"{TEMPORARY}folder").mkdir()
    (tmp_path / f"{TEMPORARY}folder" / f"{TEMPORARY}inside").write_text("x")
    (tmp_path / "deep" / "mine").write_text("x")
    remove_leftovers(tmp_path)
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == ["deep", "deep/mine"]


DISK_FULL = """
    import json, resource, sys
    from pathlib import Path
    from nestling.errors import StorageError
    from nestling.files import Appender, write_bytes, write_folder

    folder = Path(sys.argv[1])
    log = Appender(folder / "log", 10)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
    said = {}
    def attempt(name, call):
        try:
            call()
        except StorageError as error:
            said[name] = str(error)
    attempt("file", lambda: write_bytes(folder / "file", b"n" * 10_000))
    attempt("folder", lambda: write_folder(folder / "folder", {"a": b"n", "b": b"n" * 10_000}))
    for number in range(1000):
        log.append({"step": number})
    attempt("log", log.flush)
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    print(json.dumps([said, log.offset, log.flush()]))
"""


def test_a_full_disk(tmp_path: Path) -> None:
    """RLIMIT_FSIZE stands for it: writes past 4 KiB fail. What was there stays whole, and nothing half is left."""
    write_bytes(tmp_path / "file", b"old" * 3000)
    write_folder(tmp_path / "folder", {"a": b"old" * 3000})
    (tmp_path / "log").write_bytes(b'{"a": 1}\n\n')
    done = run_python(DISK_FULL, str(tmp_path))
    assert done.returncode == 0, done.stderr
    said, offset, end = json.loads(done.stdout)
    assert said.keys() == {"file", "folder", "log"}
    for name, text in said.items():
        assert text.startswith(f"cannot write {tmp_path / name}: ")
        assert text.endswith("run the same command again")
    assert (tmp_path / "file").read_bytes() == b"old" * 3000
    assert {p.name: p.read_bytes() for p in (tmp_path / "folder").iterdir()} == {"a": b"old" * 3000}
    assert listing(tmp_path) == ["file", "folder", "log"]
    # The log was cut back to where it was, and takes everything once there is space again.
    assert offset == 10 and end == (tmp_path / "log").stat().st_size
    assert read_lines(tmp_path / "log") == [{"a": 1}, *({"step": number} for number in range(1000))]


# Logs ----------------------------------------------------------------------------------------------------------------


def test_a_log_grows_and_is_cut_to_its_checkpoint(tmp_path: Path) -> None:
    log = Appender(tmp_path / "new" / "log")
    assert (log.flush(), log.offset) == (0, 0)
    log.append({"step": 1, "name": "ü"})
    assert (tmp_path / "new" / "log").read_bytes() == b"", "written before the flush"
    kept = log.flush(sync=True)
    log.append({"step": 2})
    assert log.flush() == (tmp_path / "new" / "log").stat().st_size > kept == log.offset - len('{"step": 2}\n')
    again = Appender(tmp_path / "new" / "log", kept)
    again.append({"step": 3})
    again.flush()
    assert [record["step"] for record in read_lines(again.path)] == [1, 3]


def test_a_torn_last_line_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b'{"step": 1}\n{"step": 2}\n{"st')
    assert [record["step"] for record in read_lines(path)] == [1, 2]
    log = Appender(path, 12)
    log.append({"step": 9})
    log.flush()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 9}\n'


def test_a_log_shorter_than_its_checkpoint_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(b"{}\n")
    with pytest.raises(StorageError, match=r"log is shorter \(3 bytes\) than its checkpoint says \(4\)"):
        Appender(tmp_path / "log", 4)
    assert (tmp_path / "log").read_bytes() == b"{}\n"


def test_a_log_has_no_nan(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        Appender(tmp_path / "log").append({"loss": float("inf")})


# Locks ---------------------------------------------------------------------------------------------------------------

HOLDER = """
    import os, sys, time
    from nestling.lock import RunLock
    with RunLock(sys.argv[1]):
        forked = len(sys.argv) > 2
        if not forked or os.fork() == 0:
            print("held", flush=True)
            if forked:
                # A worker that outlives its parent.
                os.execvp("sleep", ["sleep", "60"]) if sys.argv[2] == "exec" else time.sleep(60)
                os._exit(0)
        sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock of ``folder``, in a session of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.stdin.close()
        process.stdout.close()
        process.wait()


def test_a_second_holder_is_told_of_the_first(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as other:
        with pytest.raises(BusyError, match=f"is held by process {other.pid} on .*: wait for it") as error:
            RunLock(tmp_path / "run").__enter__()
        assert error.value.exit_code == 6
        assert (tmp_path / "run" / "run.lock").exists(), "the refused one removed the lock of the other"
        assert other.stdin is not None
        other.stdin.close()
        other.wait(timeout=30)
        with RunLock(tmp_path / "run"):
            pass


def test_the_name_of_a_killed_holder_is_not_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A new holder writes its name down a moment after it has the lock; whoever comes between waits for it."""
    with holder(tmp_path / "run") as killed:
        killed.kill()
        killed.wait()
        stale = (tmp_path / "run" / "run.lock").read_text()
    assert f"process {killed.pid} on" in stale
    with RunLock(tmp_path / "run"):
        name = (tmp_path / "run" / "run.lock").read_text()
        for before in (stale, ""):
            (tmp_path / "run" / "run.lock").write_text(before)
            late = threading.Timer(0.1, (tmp_path / "run" / "run.lock").write_text, [name])
            late.start()
            with pytest.raises(BusyError, match=f"held by process {os.getpid()} on"):
                RunLock(tmp_path / "run").__enter__()
            late.join()
        # One that never writes it is not waited for without end.
        monkeypatch.setattr("nestling.lock.WAIT", 0.2)
        (tmp_path / "run" / "run.lock").write_text("")
        with pytest.raises(BusyError, match="held by another process"):
            RunLock(tmp_path / "run").__enter__()


def test_in_one_process_too(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        with pytest.raises(BusyError, match=f"held by process {os.getpid()}"), RunLock(tmp_path / "run"):
            pass
        with pytest.raises(BusyError), RunLock(tmp_path / "run"):
            pass


@pytest.mark.parametrize("worker", [[], ["fork"], ["exec"]], ids=["alone", "with a forked worker", "with a command"])
def test_a_killed_holder_holds_no_more(worker: list[str], tmp_path: Path) -> None:
    """At once, also where children of it live on: a forked child closes the lock, a started command never gets it."""
    with holder(tmp_path / "run", *worker) as other:
        other.kill()
        other.wait()
        with RunLock(tmp_path / "run"):
            assert str(os.getpid()) in (tmp_path / "run" / "run.lock").read_text()


def test_a_forked_child_does_not_release_its_parents_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        done = run_python(
            """
            import os, sys
            from nestling.errors import BusyError
            from nestling.lock import RunLock
            with RunLock(sys.argv[1] + "-other") as lock:
                child = os.fork()
                if child == 0:
                    assert lock.descriptor is None
                    os._exit(0)
                os.waitpid(child, 0)
                try:
                    with RunLock(sys.argv[1] + "-other"):
                        print("taken")
                except BusyError:
                    print("still held")
            """,
            str(tmp_path / "run"),
        )
    assert done.stdout == "still held\n", done.stderr


def test_a_refused_command_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), RunLock(tmp_path / "deep" / "run"):
        raise KeyError
    assert listing(tmp_path) == []
    (tmp_path / "empty").mkdir()
    with RunLock(tmp_path / "empty"):
        pass
    assert listing(tmp_path) == ["empty"], "a folder that was there before was removed"


def test_a_folder_with_content_stays(tmp_path: Path) -> None:
    with RunLock(tmp_path / "run"):
        write_text(tmp_path / "run" / "recipe.toml", "x")
    assert (tmp_path / "run" / "recipe.toml").read_text() == "x"
    with pytest.raises(KeyError), RunLock(tmp_path / "run"):
        raise KeyError
    assert (tmp_path / "run" / "recipe.toml").exists()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(StorageError, match="cannot write"), RunLock(tmp_path / "file" / "run"):
        pass
    assert listing(tmp_path) == ["file"]
