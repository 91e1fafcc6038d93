"""What ``tests/test_imports.py`` reads from the source, seen at run time: who opens a file of the run for writing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, sys
import nestling.files, nestling.lock

FILES = {nestling.files.__file__, nestling.lock.__file__}
folder, wrong, through = sys.argv[1], set(), set()
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC

def watch(event, arguments):
    if event == "open":
        paths = arguments[:1] if (arguments[2] or 0) & WRITING else ()
    elif event in ("os.rename", "os.link", "os.symlink", "os.truncate"):
        paths = arguments[:2]
    else:
        return
    for path in paths:
        # TensorBoard, where it is installed, keeps a store of its own, that nothing of ours reads.
        other = os.path.join(folder, "tensorboard", "")
        if isinstance(path, (str, bytes, os.PathLike)) and os.fsdecode(path).startswith(folder) and not (
            os.fsdecode(path).startswith(other)
        ):
            frame, callers = sys._getframe(1), []
            while frame is not None:
                callers.append(frame.f_code.co_filename)
                frame = frame.f_back
            (through if FILES & set(callers) else wrong).add((event, os.path.basename(os.fsdecode(path)), *callers[:3]))

sys.addaudithook(watch)
from nestling.__main__ import main
try:
    code = main(sys.argv[2:])
except SystemExit as end:
    code = end.code
assert not code, code
assert through, "nothing was written: the watch is blind"
assert not wrong, wrong
"""


def test_a_run_writes_through_nestling_files_alone(tmp_path: Path) -> None:
    """A training with report and bundle; ``open`` and its kin tell Python's audit hook who calls them."""
    out = tmp_path.resolve() / "run"
    arguments = [
        "train",
        "digits",
        "--method",
        "end-to-end",
        "--set",
        "epochs=1",
        "steps_per_epoch=2",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(out), *arguments], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (out / "model" / "model.safetensors").is_file()
    assert (out / "report.html").is_file()
