"""How fast we are, beside what there is to compare with: ``python benchmarks/bench.py [--rows loop,help]``.

Rows with two sides measure both in turns, in short bursts, and take the median of the pairs: a neighbour who takes the
cores for a while takes them from both. Prints a line for each row and a table of memory, and writes each into
results/bench.json once it is measured, in the place of what stood there; other rows stay. A quarter of an hour on two
cores.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

# As the command line sets it, before torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import exact
import robust
import torch
from attacks import deepfool
from epochs import against_checkpointing, deep_against_early
from loops import TINY, Bare, Size, beside, checkpointing, made, network
from memory import beside as ways
from memory import lines, table
from paired import Row, in_turns, process
from search import answer, clusters, instances, million_rows, recall_memory

from nestling.data.transforms import Augmentation
from nestling.engine.runtime import Runtime, cpu_has_bf16
from nestling.errors import unknown
from nestling.files import write_json
from nestling.provenance import commit, hardware, versions

EVERYTHING = """
import torch, nestling
for module in (nestling, nestling.functional, nestling.methods):
    for name in module.__all__:
        getattr(module, name)
"""


def loop(folder: Path, size: Size) -> Row:
    """Our engine's loop over a bare one that does the same."""
    ours, theirs = beside(folder, made(size), size)
    text = "fit over a bare loop of the same precision, layout and optimiser"
    return Row(name="loop", text=text, unit="images/s", ours=ours, theirs=theirs, target=0.97)


def default(folder: Path, size: Size) -> Row:
    """Our defaults over the loop that a user writes first."""
    ours, theirs = beside(folder, made(size), size, precision="fp32", channels_last=False)
    text = f"fit with precision auto ({Runtime.choose('cpu').precision}) over a plain loop in fp32"
    target = 2.0 if cpu_has_bf16() else 1.0
    return Row(name="default", text=text, unit="images/s", ours=ours, theirs=theirs, target=target)


def augmentation(folder: Path, size: Size) -> Row:
    """Crop and mirror over the network that consumes their images."""
    data = made(size)
    images, rows = data.images(data.index[: size.batch]), torch.arange(size.batch)
    augment = Augmentation.parse("crop-mirror", data.image_shape)
    bare = Bare(network(data, size), data, size, Runtime.choose("cpu").precision, channels_last=True)
    repeated = 20 * size.burst

    def ours() -> None:
        for key in range(repeated):
            augment(images, key, rows)

    in_turns(ours, lambda: bare.run(size.burst), 1)
    times = in_turns(ours, lambda: bare.run(size.burst), size.rounds, size.most)
    text = "crop and mirror over the training of that network"
    augmented, trained = ([count * size.batch / s for s in t] for count, t in zip((repeated, size.burst), times))
    return Row(name="augment", text=text, unit="images/s", ours=augmented, theirs=trained, target=20)


def saving(folder: Path, size: Size) -> Row:
    """Checkpoints' share of a run."""
    spent, total = checkpointing(folder, made(size), size)
    text = "saving over a whole run, by the default rules"
    return Row(name="checkpoint", text=text, unit="s", ours=[spent], theirs=[total], target=0.02, at_least=False)


def help_(folder: Path, size: Size) -> Row:
    """The first thing that anybody waits for."""
    times, _ = in_turns(process(sys.executable, "-m", "nestling", "--help"), lambda: None, size.starts)
    return Row(
        name="help",
        text="nestling --help in a cold process",
        unit="s",
        ours=times,
        theirs=times,
        measure="ours",
        target=0.3,
        at_least=False,
    )


def import_(folder: Path, size: Size) -> Row:
    """What we add to the import of torch, with all that is public touched."""
    ours, theirs = (process(sys.executable, "-c", code) for code in (EVERYTHING, "import torch"))
    mine, alone = in_turns(ours, theirs, size.starts)
    text = "import torch and all of nestling, less import torch"
    return Row(
        name="import",
        text=text,
        unit="s",
        ours=mine,
        theirs=alone,
        measure="ours - theirs",
        target=0.2,
        at_least=False,
    )


def share(name: str, figure: str, text: str, rival: str, target: float, folder: Path, size: Size) -> Row:
    """Of the memory that another way of training the network of k = 1 takes, what layerwise training does."""
    found = ways(size.networks["k=1"])
    ours, theirs = ([found[way][figure] / 1e6] for way in ("layerwise", rival))
    return Row(name=name, text=text, unit="MB", ours=ours, theirs=theirs, target=target, at_least=False)


def epoch_of_rival(folder: Path, size: Size) -> Row:
    """Less memory may be had for more time, too: layerwise training must not be what takes longer."""
    ours, theirs = against_checkpointing(size)
    text = "an epoch of the last layer over one of the whole network with checkpoints"
    return Row(name="epoch-checkpointing", text=text, unit="s", ours=ours, theirs=theirs, target=1.0, at_least=False)


def cached_epoch(folder: Path, size: Size) -> Row:
    """On kept maps a layer costs what it costs itself, however deep it stands."""
    ours, theirs = deep_against_early(size)
    text = "an epoch of layer 5 over one of layer 2, on kept maps"
    return Row(name="cached-epoch", text=text, unit="s", ours=ours, theirs=theirs, target=1.15, at_least=False)


ROWS: dict[str, Callable[[Path, Size], Row]] = {
    "loop": loop,
    "default": default,
    "augment": augmentation,
    "checkpoint": saving,
    "help": help_,
    "import": import_,
    **{
        name: partial(share, name, figure, f"{text} of layerwise training over those of {rival}", rival, target)
        for name, figure, text, rival, target in (
            ("memory", "tensors", "bytes of tensors", "end-to-end", 0.40),
            ("resident", "resident", "resident bytes", "end-to-end", 0.40),
            ("memory-checkpointing", "tensors", "bytes of tensors", "checkpointing", 1.0),
            ("resident-checkpointing", "resident", "resident bytes", "checkpointing", 1.0),
        )
    },
    "epoch-checkpointing": epoch_of_rival,
    "cached-epoch": cached_epoch,
    "concepts": robust.concepts,
    "second-pass": robust.second_pass,
    "instances": instances,
    "clusters": clusters,
    "search": answer,
    "recall-memory": recall_memory,
    "million-rows": million_rows,
    "deepfool": deepfool,
    **(exact.ROWS_OF_FAISS if exact.INSTALLED else {}),
}
EVERY = ROWS | exact.ROWS_OF_FAISS
"""Those that need FAISS are measured where it is installed, and say what they miss where they are named."""
TABLE = "memory-table"
"""What every network takes by each way, which no target is set for."""


def main() -> None:
    """Measure, print and write."""
    known = [*ROWS, TABLE]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", default="", help=f"some of {','.join([*EVERY, TABLE])}; by default {','.join(known)}")
    parser.add_argument("--out", default="results/bench.json")
    parser.add_argument("--tiny", action="store_true", help="so small that the figures mean nothing: does it run?")
    options = parser.parse_args()
    names = [name for name in options.rows.split(",") if name] or known
    for name in names:
        if name not in [*EVERY, TABLE]:
            raise SystemExit(str(unknown("row", name, [*EVERY, TABLE])))
    size = TINY if options.tiny else Size()
    out = Path(options.out)
    Path("runs").mkdir(exist_ok=True)
    # On the disk that runs are written to, not in memory as a /tmp may be.
    with tempfile.TemporaryDirectory(prefix="bench-", dir="runs") as folder:
        for name in names:
            if name in EVERY:
                began = time.monotonic()
                row = EVERY[name](Path(folder) / name, size)
                print(row.line(), flush=True)
                add(out, "rows", [{**row.record(), **circumstances(began)}])
    if TABLE in names:
        began = time.monotonic()
        memory = table(size.networks)
        for line in lines(memory):
            print(line)
        add(
            out, "memory", [{"name": f"{row['network']} {row['way']}", **row, **circumstances(began)} for row in memory]
        )


def circumstances(began: float) -> dict[str, object]:
    """Where, when and with what something was measured since ``began``."""
    return {
        "commit": commit(),
        "hardware": f"{hardware()}, {'with' if cpu_has_bf16() else 'without'} bf16 instructions",
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "seconds": round(time.monotonic() - began, 1),
    }


def add(path: Path, kind: str, measured: Sequence[Mapping[str, Any]]) -> None:
    """Write what was measured into the file, in the place of entries of the same names."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        before = {}
    found = {"name": "bench", "rows": before.get("rows", []), "memory": before.get("memory", [])}
    entries = {entry["name"]: entry for entry in [*found[kind], *measured]}
    order = {name: number for number, name in enumerate(EVERY)}
    found[kind] = sorted(entries.values(), key=lambda entry: order.get(entry["name"], len(order)))
    write_json(path, found)


if __name__ == "__main__":
    main()
