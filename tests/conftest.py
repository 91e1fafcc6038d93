"""What every test shares: one thread, a small tree, a small set, and the record of a run that took long."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

# Before anything imports matplotlib or torch: no display, and no second thread (tiny models are slower on two).
os.environ["MPLBACKEND"] = "Agg"

import hypothesis
import numpy as np
import torch

if TYPE_CHECKING:
    from nestling.data.dataset import LabelledData
    from nestling.taxonomy import Taxonomy

torch.set_num_threads(1)

# The same examples at every run: a failure in CI is a failure at the desk.
hypothesis.settings.register_profile("nestling", deadline=None, derandomize=True, database=None, max_examples=50)
hypothesis.settings.load_profile("nestling")

ROOT = Path(__file__).resolve().parent.parent

TOY_PATHS = (
    "animal/bird/owl",
    "animal/bird/wren",
    "animal/fish/carp",
    "animal/fish/pike",
    "plant/tree/ash",
    "plant/tree/oak",
)
"""2 coarse, 3 middle and 6 fine classes; ``plant`` has one child."""


@pytest.fixture(scope="session")
def toy_taxonomy() -> Taxonomy:
    """Levels coarse (2), middle (3) and fine (6)."""
    from nestling.taxonomy import Taxonomy

    return Taxonomy.from_paths(TOY_PATHS)


@pytest.fixture(scope="session")
def toy_data(toy_taxonomy: Taxonomy) -> LabelledData:
    """240 grey images of 8x8, 40 of each fine class, every label known.

    A class is a bright quarter of the image (its middle class), striped one way or the other (which of two): learned in
    seconds, and a model that knows the middle class alone is right half of the time about the fine one.
    """
    from nestling.data.dataset import LabelledData

    generator = np.random.default_rng(0)
    fine = np.arange(240) % 6
    images = np.zeros((240, 1, 8, 8))
    for row, label in enumerate(fine):
        top, left = divmod(label // 2, 2)
        quarter = np.full((4, 4), 90.0)
        (quarter if label % 2 else quarter.T)[::2] = 220
        images[row, 0, 4 * top : 4 * top + 4, 4 * left : 4 * left + 4] = quarter
    images = np.clip(images + generator.normal(0, 20, images.shape), 0, 255).round().astype(np.uint8)
    labels = toy_taxonomy.encode([TOY_PATHS[label].split("/") for label in fine])
    return LabelledData(
        inputs=torch.from_numpy(images),
        labels=labels,
        index=np.arange(240),
        taxonomy=toy_taxonomy,
        name="toy",
    )


@pytest.fixture(scope="session")
def nestling_data() -> Path:
    """The folder of real sets that NESTLING_DATA names; without it the test is skipped."""
    folder = os.environ.get("NESTLING_DATA")
    if not folder:
        pytest.skip("needs real data: set NESTLING_DATA to a folder that holds mnist/train.parquet and the others")
    path = Path(folder)
    if not path.is_dir():
        pytest.fail(f"NESTLING_DATA is no folder: {folder}")
    return path


def pytest_addoption(parser: pytest.Parser) -> None:
    # To be given as --record=FILE: before this file is read, a FILE of its own would be taken for the tests to run.
    parser.addoption("--record", metavar="FILE", help="write as JSON what ran, where, how long, and record_property")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_started] = time.time()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, exitstatus: int, config: pytest.Config) -> None:
    target = config.getoption("--record")
    if not target:
        return
    reports = [
        report
        for outcome in ("passed", "failed", "error", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
    ]
    record = {
        "name": Path(target).stem,
        "command": " ".join(["pytest", *config.invocation_params.args]),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "commit": _commit(),
        "hardware": _hardware(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "exit_status": int(exitstatus),
        "seconds": round(time.time() - config.stash[_started], 1),
        "tests": {
            report.nodeid: {
                "outcome": report.outcome,
                "seconds": round(report.duration, 1),
                **dict(report.user_properties),
                **({"reason": report.longrepr[2].removeprefix("Skipped: ")} if report.outcome == "skipped" else {}),
            }
            for report in reports
        },
    }
    path = Path(target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    terminalreporter.write_line(f"recorded in {target}")


_started = pytest.StashKey[float]()


def _hardware() -> str:
    """The processor and its cores, and the GPU where there is one."""
    try:
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text(encoding="utf-8"))
    except OSError:
        names = []
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return ", ".join([names[0] if names else platform.machine(), f"{os.cpu_count()} cores", *gpu])


def _commit() -> str | None:
    """The commit that the tests ran on, with a + where the tree held changes."""
    try:
        commit, changes = (
            subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
            for arguments in (("rev-parse", "HEAD"), ("status", "--porcelain"))
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return commit + ("+" if changes else "")
