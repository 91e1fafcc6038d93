"""What search costs: instance rows, exact retrieval, k-means; paired with what one would take else."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from loops import Size
from paired import Row, in_turns
from sklearn.cluster import KMeans
from torch import Tensor

from nestling.evaluate.retrieval import highest, normalised
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


def retrieval(folder: Path, size: Size) -> Row:
    """Nine neighbours among 60,502 rows of 512, for blocks of queries, over FAISS's exact index."""
    try:
        import faiss
    except ImportError as error:
        raise SystemExit("the row 'retrieval' needs faiss: pip install 'nestling[bench]'") from error

    gallery = normalised(torch.randn(60_502 if size.rounds > 3 else 3_000, WIDTH))
    queries, index = gallery[:1000], faiss.IndexFlatIP(WIDTH)
    faiss.omp_set_num_threads(torch.get_num_threads())
    index.add(gallery.numpy())

    def ours() -> None:
        for block in queries.split(277):
            highest(block @ gallery.T, 9)

    text = "nine neighbours of 1,000 queries among 60,502 rows, over FAISS's exact index"
    return paired("retrieval", text, ours, lambda: index.search(queries.numpy(), 9), size, 1.0)


def clusters(folder: Path, size: Size) -> Row:
    """k-means of one class of 2,500 rows into 500, over scikit-learn's; the same iterations at most."""
    rows = torch.randn(2_500 if size.rounds > 3 else 300, WIDTH)
    num = len(rows) // 5
    values = rows.numpy()

    def theirs() -> None:
        KMeans(num, init="random", n_init=1, max_iter=20, random_state=0).fit(values)

    text = "k-means of 2,500 rows into 500 clusters, over scikit-learn's"
    return paired("clusters", text, lambda: kmeans(rows, num), theirs, size, 1.0)


def paired(
    name: str, text: str, ours: Callable[[], object], theirs: Callable[[], object], size: Size, target: float
) -> Row:
    """Seconds of both in turns, after one of each that warms up."""
    in_turns(ours, theirs, 1)
    mine, other = in_turns(ours, theirs, size.rounds, size.most)
    return Row(name=name, text=text, unit="s", ours=mine, theirs=other, target=target, at_least=False)
