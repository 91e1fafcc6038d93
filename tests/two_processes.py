"""What ``test_shapes`` runs on two processes, and on one to compare with: ``two_processes.py MEETING_FILE OUT``."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from layers import recipe as layerwise
from nestling import collective
from nestling.data.batch import Batch
from nestling.data.dataset import LabelledData
from nestling.data.text import TextEncoding
from nestling.engine.fit import fit
from nestling.engine.run import Run
from nestling.errors import DivergedError
from nestling.methods import Coins, FlatMarginal, Nested, Robust
from nestling.methods.coins import Moco
from nestling.methods.recipe import Optimizer, Recipe, Select
from nestling.models.model import Model, Outputs
from nestling.models.words import Words
from nestling.objectives.instance_terms import InstanceWithin
from nestling.objectives.reducers import Mean
from nestling.objectives.terms import CrossEntropy, SimilarityMatching
from small import BACKBONE, one_stage, rows, small_model
from toy_recipes import RECIPES, toy_model

SGD = Optimizer(name="sgd", lr=0.1)

CURVES: dict[str, Recipe] = {
    "nested": Nested(epochs=(1, 1, 2), batch_size=15, steps_per_epoch=6, norm="none", optimizer=SGD),
    "paper": Nested(
        epochs=1, batch_size=8, norm="none", marginal=False, reading="exact", balance="rows", optimizer=SGD
    ),
    "layerwise": layerwise(augmentation="affine", views=2, together=2),
    "layerwise, similar": layerwise(similarity=0.9, levels_at=("middle", "fine"), batch_size=23),
    "robust": Robust(epochs=3, batch_size=15, steps_per_epoch=7, norm="none", optimizer=SGD, schedule="auto"),
    "group-dro": Robust(epochs=2, batch_size=9, norm="none", optimizer=SGD, ascent="group-dro", smoothness=1.0),
    "coins": Coins(variant="coinsp", epochs=4, batch_size=9, steps_per_epoch=5, norm="none", proxy_weight=1.0),
    "instances": Coins(variant="coins", epochs=2, batch_size=15, norm="none"),
    "contrast": Coins(variant="supcon", epochs=2, batch_size=15, norm="none", augmentation="none"),
    "momentum": Coins(variant="moco-coarse", epochs=2, batch_size=9, norm="none", moco=Moco(queue=20, momentum=0.9)),
    "taught": Nested(
        epochs=(1, 1, 2), batch_size=15, steps_per_epoch=6, norm="none", optimizer=SGD, self_training=1.0, averaged=True
    ),
    "flat": FlatMarginal(epochs=2, batch_size=9, steps_per_epoch=7, norm="none", optimizer=SGD),
}


class OneRowIsNotFinite(CrossEntropy):
    """NaN where row 7 is, which only one process sees."""

    def forward(self, outputs: Outputs, batch: Batch) -> tuple[Tensor, Tensor]:
        values, _ = super().forward(outputs, batch)
        return torch.where(batch.index == 7, torch.nan, values), torch.ones_like(values)


def train(recipe: Recipe, data: LabelledData, model: Model | None = None) -> Run:
    """``fit``, whose weights and buffers are the same on every process."""
    backbone = {} if model is not None else {"backbone": BACKBONE}
    run = fit(recipe, data, model, device="cpu", precision="fp32", verbose=False, **backbone)  # type: ignore[arg-type]
    for name, tensor in run.model.state_dict().items():
        assert torch.equal(collective.all_sum(tensor), collective.world_size() * tensor), (
            f"the processes differ: {name}"
        )
    return run


def figures(run: Run) -> dict[str, Any]:
    """What is compared with one process."""
    state = run.model.state_dict()
    return {
        "losses": [record["loss"] for record in run.history],
        "validation": [record.get("validation loss", 0.0) for record in run.history],
        "names": [f"{name} {list(tensor.shape)}" for name, tensor in state.items()],
        "weights": torch.cat([tensor.flatten() for tensor in state.values()]).tolist(),
    }


def results() -> dict[str, Any]:
    """Everything that must be the same on one process and on two."""
    data, found = rows(), {}
    for name, recipe in CURVES.items():
        found[name] = figures(train(recipe, data))
    for name, recipe in RECIPES.items():
        found[f"toy {name}"] = figures(train(recipe, data, toy_model(name, data, norm="none")))
        # With batch norm the curves differ, the processes do not.
        train(recipe, data, toy_model(name, data, norm="batch"))
    # Odd batches in parts of two and three rows, all of which have the label.
    for rows_at_once in (2, 3, 4):
        parts = one_stage(
            lambda model, rows, size=rows_at_once: (
                {"micro_batch": size, "objective": CrossEntropy("coarse")}
                | {"trainable": model.parts("coarse"), "until": "coarse"}
            ),
            batch_size=7,
            steps_per_epoch=3,
        )
        found[f"micro-batches of {rows_at_once}"] = figures(
            train(parts, data, small_model(data, options={"norm": "none"}))
        )
    try:
        train(one_stage(lambda model, rows: {"trainable": [model]}), data)
    except ValueError as error:
        found["unused parameter"] = str(error)
    try:
        train(one_stage(lambda model, rows: {"objective": OneRowIsNotFinite("fine")}, epochs=20), data)
    except DivergedError as error:
        found["one process diverges"] = str(error)
    # A metric that each process would answer in its own way: the first decides.
    calls = iter(range(100))

    def metric(*_: object) -> float:
        return float(next(calls) if collective.rank() == 0 else -next(calls))

    run = train(one_stage(lambda model, rows: {"select": Select(metric, "score"), "patience": 1}, epochs=4), data)
    found["metric"] = [record["score"] for record in run.history]
    found["gradient of the mean"] = gradient_of_the_mean()
    found["gradient through a gather"] = gradient_through_a_gather()
    found["gradient of similarity matching"] = gradient_of_similarity_matching()
    found["rows of their own"] = rows_of_their_own()
    found["documents"] = documents()
    return found


def gradient_of_the_mean() -> list[float]:
    """Of a batch whose labelled rows all fall to the second process: averaged over processes, as in training."""
    values = torch.arange(1.0, 9.0, requires_grad=True)
    weights = torch.tensor([0.0, 1.0, 0.0, 2.0, 0.0, 1.0, 0.0, 0.0])
    mine = slice(collective.rank(), None, collective.world_size())
    Mean()(values[mine] ** 2, weights[mine], None).backward()  # type: ignore[arg-type]
    assert values.grad is not None
    return (collective.all_sum(values.grad) / collective.world_size()).tolist()


def gradient_through_a_gather() -> list[float]:
    """Of a term on all pairs of rows; five rows, so that one process has more than the other."""
    values = torch.tensor([1.0, 2.0, 3.0, 5.0, 8.0], requires_grad=True)
    mine = values[collective.rank() :: collective.world_size()]
    pairs = mine[:, None] * collective.gather(mine)
    (pairs**2).sum().backward()
    assert values.grad is not None
    return collective.all_sum(values.grad).tolist()


def gradient_of_similarity_matching() -> list[float]:
    """Of nine rows, two of them without a label, both of which fall to the first process."""
    features = torch.randn(9, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    labels = torch.tensor([0, 1, -1, 0, 2, 2, -1, 0, 1])
    mine = slice(collective.rank(), None, collective.world_size())
    batch = Batch(features[mine], labels[mine, None], torch.arange(9)[mine], ("only",))
    term = SimilarityMatching("only", 3)
    term.reducer(*term(Outputs({}, {"only": features[mine]}, features[mine]), batch), batch).backward()
    assert features.grad is not None
    return (collective.all_sum(features.grad) / collective.world_size()).flatten().tolist()


def rows_of_their_own() -> list[float]:
    """After five steps on batches of seven: the same on every process, to the last bit."""
    torch.manual_seed(0)
    term = InstanceWithin("coarse", np.arange(20), np.arange(20) % 4, 3, unit=True)
    for step in range(5):
        features, index = torch.randn(7, 3), torch.randint(20, (7,))
        mine = slice(collective.rank(), None, collective.world_size())
        outputs = Outputs({}, {"coarse": features[mine].requires_grad_()}, features)
        batch = Batch(features, index[:, None], index[mine], ("coarse",))
        term.reducer(*term(outputs, batch), batch).backward()
        term.step(0.5 / (1 + step))
    for tensor in term.state_dict().values():
        assert torch.equal(collective.all_sum(tensor), collective.world_size() * tensor), "the processes differ"
    return term.rows.current().flatten().tolist()


def documents() -> list[float]:
    """How many texts of two batches, of five and of two, hold each of four words; at first how many there were."""
    words, texts = Words().train(), TextEncoding(4).encode(["a1 b1", "a1", "c1 c1", "b1 a1", "", "a1", "d1"])
    for batch in (texts[:5], texts[5:]):
        words.read(batch[collective.rank() :: collective.world_size()])
    of = TextEncoding(1).encode(["a1", "b1", "c1", "d1"])[:, 0, 0, 0].long()
    return [words.documents[0].item(), *words.documents[of].tolist()]


def main() -> None:
    torch.set_num_threads(1)
    meeting, out = sys.argv[1:]
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"])
    )
    assert collective.world_size() == 2
    found = results()
    if collective.rank() == 0:
        Path(out).write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
