"""What finds a text: the network's features, its words, or both. ``python benchmarks/text_search.py``.

2,000 training rows of newsgroups20 are held out in whole threads of messages, three times; on the others, with coarse
labels alone, search from coarse labels and nested learning are trained, and the held-out rows are searched among each
other: Recall@1 at both levels, and the coarse accuracy of the same networks. No test row is read. A text's neighbours
are often of its own thread, which makes all of it easier than the classes are.

Writes results/text-search.json. Needs NESTLING_DATA.
"""

from __future__ import annotations

import re
import time

import numpy as np
import torch
from choose import write_table
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.data.sources import load_data
from nestling.engine.fit import fit
from nestling.engine.predict import predict
from nestling.engine.runtime import Runtime
from nestling.evaluate.retrieval import recall_at_k
from nestling.methods import Coins, Nested
from nestling.methods.recipe import Recipe
from nestling.models.words import HASHED

SEEDS = (0, 1, 2)
HELD = 2_000
RECIPES: dict[str, Recipe] = {"coins": Coins(epochs=6), "nested": Nested(epochs=6)}


def threads(data: LabelledData) -> np.ndarray:
    """(n,): the number of each message's thread, by its subject without Re:."""
    assert isinstance(data.inputs, list)
    subjects = [re.sub(r"^(\s*(re|fwd?)\s*:\s*)+", "", text.split("\n", 1)[0].lower()).strip() for text in data.inputs]
    return np.unique(subjects, return_inverse=True)[1]


def cut(data: LabelledData, seed: int) -> tuple[LabelledData, LabelledData]:
    """Rows to learn from, and ``HELD`` others of other threads."""
    thread = threads(data)
    rank = np.random.default_rng(seed).permutation(thread.max() + 1)[thread]
    order = np.argsort(rank, kind="stable")
    # The thread on the border is left out.
    border = rank[order[HELD]]
    return data.subset(np.flatnonzero(rank > border)), data.subset(np.flatnonzero(rank < border))


def main() -> None:
    """Train, search, and write the table."""
    began, runtime = time.monotonic(), Runtime.choose("cpu", "fp32")
    data = load_data("newsgroups20", "train")
    found: dict[tuple[str, str], list[float]] = {}
    for seed in SEEDS:
        rest, held = cut(data, seed)
        coarse = rest.keep({"fine": 0.0}, seed)
        for name, recipe in RECIPES.items():
            # Nested learning has no use for a level without labels.
            train = coarse if name == "coins" else coarse_alone(coarse)
            run = fit(recipe, train, seed=seed, device="cpu", precision="fp32", verbose=False)
            outputs, _ = predict(run.model, DeviceData(held, run.preprocessing, runtime.device), runtime)
            right = run.model.answers(outputs).combined["coarse"].argmax(1).numpy() == held.labels[:, 0]
            found.setdefault((name, "coarse accuracy"), []).append(float(right.mean()))
            both = outputs.embedding
            for part, features in parts(both).items():
                for number, level in enumerate(held.taxonomy.levels):
                    recall = recall_at_k(features, torch.from_numpy(held.labels[:, number]), ks=(1,))[1]
                    found.setdefault((f"{name}, {part}", f"{level} R@1"), []).append(float(recall))
        print(seed, {" | ".join(key): round(100 * values[-1], 1) for key, values in found.items()}, flush=True)
    table = [
        {"row": row, "column": column, "mean": float(np.mean(each)), "std": float(np.std(each, ddof=1)), "n": len(each)}
        for (row, column), each in found.items()
    ]
    write_table("text-search", "python benchmarks/text_search.py", list(SEEDS), table, began)


def parts(embedding: Tensor) -> dict[str, Tensor]:
    """The network's features, the words, and both."""
    return {"network": embedding[:, :-HASHED], "words": embedding[:, -HASHED:], "both": embedding}


def coarse_alone(data: LabelledData) -> LabelledData:
    """The same rows under a tree of the coarse level alone."""
    from nestling.taxonomy import Taxonomy

    names = data.taxonomy.classes["coarse"]
    tree = Taxonomy.from_paths(list(names), ["coarse"])
    labels = tree.encode([[names[code]] for code in data.labels[:, 0].tolist()])
    return LabelledData(data.inputs, labels, tree, items=data.items)


if __name__ == "__main__":
    main()
