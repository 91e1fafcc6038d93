"""What search costs: instance rows, k-means, an answer; paired with what one would take else."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from loops import Size, made
from paired import Row, in_turns
from sklearn.cluster import KMeans
from torch import Tensor

from nestling.commands.search import read_queries
from nestling.data.transforms import Preprocessing
from nestling.evaluate.index import Index, fingerprint
from nestling.evaluate.predictor import Predictor
from nestling.evaluate.retrieval import normalised
from nestling.models.build import build_model
from nestling.objectives.instance_terms import WithinClasses
from nestling.objectives.kmeans import kmeans
from nestling.objectives.rows import ClassRows

ROWS, WIDTH, CLASSES, BATCH = 50_000, 512, 20, 256


def instances(folder: Path, size: Size) -> Row:
    """Within-class instance classification over the full n-way one: forward, backward and update."""
    rows = ROWS if size.rounds > 3 else 2_000
    term = ClassRows(np.arange(rows) % CLASSES, WIDTH, momentum=0.9, weight_decay=5e-4)
    weight = torch.nn.Parameter(term.weight.clone())
    dense = torch.optim.SGD([weight], lr=0.01, momentum=0.9, weight_decay=5e-4, fused=True)

    def drawn() -> tuple[Tensor, Tensor]:
        return torch.randn(BATCH, WIDTH, requires_grad=True), torch.randint(rows, (BATCH,))

    def within() -> None:
        features, places = drawn()
        values, gradients, kept = term.compute(features.detach(), places)
        WithinClasses.apply(features, values, gradients, kept).mean().backward()  # type: ignore[union-attr]
        term.step(kept, 0.01)

    def full() -> None:
        features, places = drawn()
        F.cross_entropy(features @ weight.T, places).backward()
        dense.step()
        dense.zero_grad(set_to_none=True)

    return paired("instances", "instance rows within classes over all rows, update included", within, full, size, 1 / 6)


def clusters(folder: Path, size: Size) -> Row:
    """k-means of one class of 2,500 rows into 500, over scikit-learn's; the same iterations at most."""
    rows = torch.randn(2_500 if size.rounds > 3 else 300, WIDTH)
    num = len(rows) // 5
    values = rows.numpy()

    def theirs() -> None:
        KMeans(num, init="random", n_init=1, max_iter=20, random_state=0).fit(values)

    text = "k-means of 2,500 rows into 500 clusters, over scikit-learn's"
    return paired("clusters", text, lambda: kmeans(rows, num), theirs, size, 1.0)


def answer(folder: Path, size: Size) -> Row:
    """Ten of 10,000 pictures for one in a file: read, embedded, compared, and the files of the answer looked for."""
    from PIL import Image

    data = made(size)
    model = build_model(data.taxonomy, data.image_shape, size.backbone, "coins")
    preprocessing = Preprocessing(*data.image_shape, mean=(0.5,) * 3, std=(0.25,) * 3)
    predictor = Predictor(model, preprocessing, "cpu")
    gallery = folder / "gallery"
    gallery.mkdir(parents=True)
    query = folder / "query.png"
    Image.fromarray(data.inputs[0].permute(1, 2, 0).numpy()).save(query)  # type: ignore[index]
    rows = 10_000 if size.rounds > 3 else 50
    items = tuple(f"{number:05d}.png" for number in range(rows))
    for item in items:
        (gallery / item).touch()
    features = normalised(torch.randn(rows, predictor.embed([]).shape[1]))
    index = Index(features, items, {"coarse": ["thing"] * rows}, fingerprint(predictor), "gallery", str(gallery))

    def ours() -> None:
        (found,) = read_queries((str(query),), predictor, index)
        assert found.features is not None
        index.search(found.features[None], 10)

    in_turns(ours, lambda: None, 1)
    times, _ = in_turns(ours, lambda: None, size.rounds, size.most)
    text = "ten of 10,000 pictures for the one in a file, after load"
    return Row(
        name="search", text=text, unit="s", ours=times, theirs=times, measure="ours", target=0.05, at_least=False
    )


def most_resident(name: str, text: str, target: float, what: str, rows: int, folder: Path, size: Size) -> Row:
    """The most memory that a process of its own has, in GB."""
    number = rows if size.rounds > 3 else rows // 500
    command = [sys.executable, str(Path(__file__).with_name("resident.py")), what, str(number), str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    value = [json.loads(done.stdout)["resident"] / 1e9]
    return Row(name=name, text=text, unit="GB", ours=value, theirs=value, measure="ours", target=target, at_least=False)


RECALL = "Recall@k of 60,502 rows of 512, torch and the features included"
MILLION = "training with a million instance rows of 128 within 20 classes"
recall_memory = partial(most_resident, "recall-memory", RECALL, 1.0, "recall", 60_502)
million_rows = partial(most_resident, "million-rows", MILLION, 8.0, "rows", 10**6)


def paired(
    name: str, text: str, ours: Callable[[], object], theirs: Callable[[], object], size: Size, target: float
) -> Row:
    """Seconds of both in turns, after one of each that warms up."""
    in_turns(ours, theirs, 1)
    mine, other = in_turns(ours, theirs, size.rounds, size.most)
    return Row(name=name, text=text, unit="s", ours=mine, theirs=other, target=target, at_least=False)
