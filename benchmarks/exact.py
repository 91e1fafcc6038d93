"""Exact search and k-means beside FAISS, in one process and on as many threads; measured where FAISS is installed."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from loops import Size
from paired import Row, in_turns, seconds
from search import CLASSES, ROWS, WIDTH
from torch import Tensor

from nestling.evaluate.retrieval import normalised, recall_at_k
from nestling.objectives.kmeans import kmeans

INSTALLED = find_spec("faiss") is not None
PRODUCTS = 60_502
"""The test rows of Stanford Online Products, in about 11,316 classes."""
ITERATIONS = 20


def faiss_module():
    """FAISS with torch's number of threads."""
    if not INSTALLED:
        raise SystemExit("this row needs faiss: pip install 'nestling[bench]'")
    import faiss

    faiss.omp_set_num_threads(torch.get_num_threads())
    return faiss


def retrieval(folder: Path, size: Size) -> Row:
    """Recall at 1, 2, 4 and 8 of 60,502 rows of 512: the whole of it, on both sides."""
    faiss = faiss_module()
    rows = PRODUCTS if size.rounds > 3 else 2_000
    features, labels = torch.randn(rows, WIDTH), torch.randint(rows // 5, (rows,))
    found: dict[str, dict[int, float]] = {}

    def ours() -> None:
        found["ours"] = recall_at_k(features, labels)

    def theirs() -> None:
        found["theirs"] = recall_by(faiss, features, labels)

    # A turn takes the better part of a minute.
    times = in_turns(ours, theirs, min(size.rounds, 4), 3 * size.most)
    assert found["ours"].keys() == found["theirs"].keys()
    # Those of equal score and those that fp32 does not tell apart may come in another order.
    assert all(abs(found["ours"][k] - found["theirs"][k]) < 1e-3 for k in found["ours"]), found
    text = f"Recall@k of {rows:,} rows of {WIDTH} over FAISS's exact index"
    return Row(name="retrieval", text=text, unit="s", ours=times[0], theirs=times[1], target=1.0, at_least=False)


def recall_by(faiss, features: Tensor, labels: Tensor) -> dict[int, float]:
    """The same figures by FAISS: nine neighbours, of which the row itself is dropped."""
    units = normalised(features)
    index = faiss.IndexFlatIP(units.shape[1])
    index.add(units.numpy())
    others = torch.from_numpy(index.search(units.numpy(), 9)[1])
    itself = others == torch.arange(len(others))[:, None]
    # Where a row is not among its nine, the last one goes.
    itself[:, -1] |= ~itself.any(1)
    right = (labels[others] == labels[:, None])[~itself].view(len(others), 8)
    return {k: right[:, :k].any(1).double().mean().item() for k in (1, 2, 4, 8)}


@cache
def classes(rows: int) -> list[tuple[float, float, float, float]]:
    """k-means within each class, into a fifth of its rows: our seconds and FAISS's, our inertia and FAISS's."""
    faiss, found = faiss_module(), []
    size = rows // CLASSES
    for number in range(CLASSES):
        # Rows of few directions, as those of a trained network: k-means has something to find.
        values = torch.randn(size, 8) @ torch.randn(8, WIDTH) + 0.3 * torch.randn(size, WIDTH)
        inertia: dict[int, float] = {}
        index = faiss.IndexFlatL2(WIDTH)

        def ours(values: Tensor = values, number: int = number, inertia: dict[int, float] = inertia) -> None:
            inertia[0] = kmeans(values, size // 5, ITERATIONS, seed=number).inertia

        def theirs(values: Tensor = values, number: int = number, index: Any = index) -> None:
            clustering = faiss.Clustering(values.shape[1], size // 5)
            clustering.niter, clustering.seed, clustering.min_points_per_centroid = ITERATIONS, number + 1, 1
            clustering.train(values.numpy(), index)

        sides = (ours, theirs) if number % 2 else (theirs, ours)
        took = {side: seconds(side) for side in sides}
        # Its index holds the centres; what they come to is no part of its time.
        found.append((took[ours], took[theirs], inertia[0], float(index.search(values.numpy(), 1)[0].sum())))
    return found


def clusters(folder: Path, size: Size) -> Row:
    """Seconds."""
    ours, theirs, _, _ = zip(*classes(ROWS if size.rounds > 3 else 1_000))
    text = "k-means of 50,000 rows into 10,000 clusters, class by class, over FAISS's"
    return Row(name="clusters-faiss", text=text, unit="s", ours=ours, theirs=theirs, target=1.0, at_least=False)


def inertia(folder: Path, size: Size) -> Row:
    """What it comes to."""
    _, _, ours, theirs = zip(*classes(ROWS if size.rounds > 3 else 1_000))
    text = "inertia of that over that of FAISS's"
    return Row(name="clusters-inertia", text=text, unit="", ours=ours, theirs=theirs, target=1.01, at_least=False)


ROWS_OF_FAISS = {"retrieval": retrieval, "clusters-faiss": clusters, "clusters-inertia": inertia}
