"""Figure 1 of search from coarse labels: what the features of each task respond to, on the set ``patches``.

The same 512 images make three tasks: 32 coarse classes told by the big patch, 128 fine classes told by the small one,
and single images, which differ by the small patch's place and a mark.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.data.made import BIG, PATCH_SIDE
from nestling.evaluate.occlusion import occlusion_maps, response
from nestling.evaluate.retrieval import recall_at_k
from nestling.files import write_json
from nestling.reproduce.coins import recipe
from nestling.reproduce.measures import Trained, trained
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Cell, Claim, Floor, Place, Table, Trial

GREY = 127
"""Of the background, with which parts are covered."""
SHOWN = (0, 133, 262, 391)
"""Images of the picture: of four coarse classes, and every place of the small patch."""
TASKS = {
    "cos": "32 coarse classes",
    "opt": "128 fine classes",
    "ins": "512 instances",
    "coins-imp": "coarse classes and instances",
}
PARTS = ("big patch", "small patch", "mark")


def parts_of(images: Tensor) -> dict[str, Tensor]:
    """Which pixels (n, h, w) are the big patch, the small one and the mark of images of ``patches`` (n, 3, h, w)."""
    drawn = (images != GREY).any(1)
    zones = {name: torch.zeros(PATCH_SIDE, PATCH_SIDE, dtype=torch.bool) for name in PARTS}
    zones["big patch"][4 : 4 + BIG, 4 : 4 + BIG] = True
    zones["small patch"][32:] = True
    zones["mark"][:32, 60:] = True
    return {name: drawn & zone for name, zone in zones.items()}


def responses(trial: Trial, place: Place) -> list[Cell]:
    """Of the turn of the features when each part is covered in turn, that part's share; R@1 among the images.

    ``options``: ``shown`` images get a map, by squares of 8 pixels ``stride`` apart, in a file beside the record.
    """
    found = trained(trial, place)
    data = found.train
    images = data.images(np.arange(len(data)))

    def embed(pictures: Tensor) -> Tensor:
        return embedding_of(found, pictures)

    turns = torch.stack([response(embed, images, mask, GREY) for mask in parts_of(images).values()])
    shares = turns / turns.sum(0).clamp_min(1e-12)
    cells = [
        Cell(trial.row, f"share of the {name}", float(share.mean()), tuple(share.tolist()))
        for name, share in zip(PARTS, shares, strict=True)
    ]
    features = embed(images)
    for number, level in enumerate(data.taxonomy.levels):
        value = recall_at_k(features, torch.from_numpy(data.labels[:, number]), ks=(1,))[1]
        cells.append(Cell(trial.row, f"{level} R@1", value, count=len(data)))
    shown = [row for row in trial.options["shown"] if row < len(data)]
    maps = occlusion_maps(embed, images[shown], 8, trial.options["stride"], GREY)
    write_json(maps_file(place.record), {"rows": shown, "maps": (1e4 * maps).round().int().tolist()})
    return cells


def embedding_of(found: Trained, pictures: Tensor) -> Tensor:
    """(n, d) of uint8 pictures."""
    rows = found.train.subset(np.zeros(len(pictures), dtype=np.int64))
    return found.outputs(replace(rows, inputs=pictures))[0].embedding.cpu()


def maps_file(record: Path) -> Path:
    return record.with_suffix(".maps.json")


def patches_trials(scale: str) -> list[Trial]:
    rows = Rows(source="patches", train_split="all", split="all")
    epochs, network = (200, "resnet18") if scale == "paper" else (60, "conv:16/32/64/128")
    options: dict[str, Any] = {"shown": SHOWN, "stride": 4}
    if scale == "smoke":
        rows, network, options = replace(rows, train=48, test=48), "conv:4/4", {"shown": (0,), "stride": 28}
    return [
        Trial(
            row=variant,
            recipe=recipe(scale, variant, epochs, 64, "none"),
            rows=rows,
            measure=responses,
            options=options,
            backbone=network,
        )
        for variant in TASKS
    ]


def picture(table: Table, result: dict[str, Any], folder: Path) -> bytes:
    """A line for each image: itself, then for each task where its features respond; below, the shares of the parts."""
    from matplotlib.ticker import PercentFormatter

    from nestling.data.sources import load_data
    from nestling.report.plots import MUTED, PALETTE, WIDTH, canvas, styled
    from nestling.report.plots import place as axes_at

    images = load_data("patches", "all")
    maps = {
        row: json.loads(file.read_text()) for row in TASKS if (file := maps_file(folder / f"{row}-0.json")).exists()
    }
    shown: Sequence[int] = next(iter(maps.values()))["rows"] if maps else ()
    tile, gap, bars, top = 1.85, 0.12, 1.5, 0.35
    height = top + len(shown) * (tile + gap) + bars + 0.75
    buffer = io.BytesIO()
    with styled():
        figure = canvas(height, min(WIDTH, 0.3 + (len(TASKS) + 1) * (tile + gap)))
        for line, row in enumerate(shown):
            bottom = height - top - (line + 1) * tile - line * gap
            for column, task in enumerate((None, *maps)):
                axes = axes_at(figure, 0.15 + column * (tile + gap), bottom, tile, tile)
                axes.set(xticks=[], yticks=[])
                axes.grid(visible=False)
                pixels = images.images(np.array([row]))[0].permute(1, 2, 0).numpy()
                axes.imshow(pixels, alpha=1.0 if task is None else 0.35)
                if task is not None:
                    found = np.array(maps[task]["maps"][line], dtype=float)
                    axes.imshow(found, cmap="inferno", alpha=0.75, vmin=0)
                if line == 0:
                    axes.set_title("image" if task is None else TASKS[task], fontsize=8.5, pad=3)
        axes = axes_at(figure, 1.9, 0.45, figure.get_size_inches()[0] - 2.1, bars)
        means = {(e["row"], e["column"]): e["mean"] or 0.0 for e in result["table"]}
        for line, row in enumerate(TASKS):
            begin = 0.0
            for part, colour in zip(PARTS, PALETTE, strict=False):
                share = means.get((row, f"share of the {part}"), 0.0)
                axes.barh(line, share, left=begin, color=colour, height=0.6, label=part if line == 0 else None)
                begin += share
        axes.set_yticks(range(len(TASKS)), list(TASKS.values()))
        axes.invert_yaxis()
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        axes.set_xlabel("share of the turn of the features when a part is covered", color=MUTED)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3)
        figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def larger(id: str, part: str, more: str, less: str) -> Claim:
    """The claim that a part has a larger share in one task than in another."""
    column = f"share of the {part}"
    text = f"the {part} has a larger share in the features of {TASKS[more]} than in those of {TASKS[less]}"
    return Claim(id=id, text=text, more=(more, column), less=(less, column))


PATCHES = Table(
    name="coins-patches",
    paper="Weakly Supervised Representation Learning with Coarse Labels, Figure 1",
    about="The set patches, our construction of Figure 1's; the paper's own, and its network, are in a supplement that "
    "we do not have. All 512 images train, without augmentation, and are looked at: an illustration, no evidence of "
    "what is found in new images. R@1 is among them too.",
    trials=patches_trials,
    floor=Floor(row="opt", column="fine R@1", least=0.9),
    claims=[
        larger("fine-small", "small patch", "opt", "cos"),
        larger("instances-small", "small patch", "ins", "cos"),
        larger("instances-mark", "mark", "ins", "opt"),
        larger("both-small", "small patch", "coins-imp", "cos"),
        larger("both-big", "big patch", "coins-imp", "ins"),
    ],
    picture=picture,
)
