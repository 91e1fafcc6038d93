"""Momentum contrast: the formula, the queue, the slow copy, and that a resumed run is the unbroken one."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.data.transforms import Augmentation, Preprocessing
from nestling.engine.stage import StageRun
from nestling.errors import UsageError
from nestling.methods import Coins
from nestling.methods.coins import Moco
from nestling.objectives.instances import info_nce
from nestling.objectives.momentum import MomentumContrast
from nestling.objectives.slow_copy import weights_as_buffers
from nestling.objectives.terms import Objective
from small import assert_same_weights, quick, small_model


def test_info_nce_by_hand() -> None:
    """A query at T = 0.5, its key beside it, one negative opposite and one across: log(1 + e^-4 + e^-2)."""
    query, key = torch.tensor([[2.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    found = info_nce(query, key, torch.tensor([[-1.0, 0.0], [0.0, 1.0]]))
    assert found.item() == pytest.approx(math.log(1 + math.exp(-4) + math.exp(-2)), abs=1e-6)


def test_info_nce_is_a_cross_entropy() -> None:
    g = torch.Generator().manual_seed(0)
    queries, keys, others = (torch.randn(n, 5, generator=g, requires_grad=n == 4) for n in (4, 4, 9))
    expected = torch.stack(
        [F.cross_entropy(torch.cat([k[None], others]) @ q, torch.tensor(0)) for q, k in zip(queries, keys)]
    )
    torch.testing.assert_close(info_nce(queries, keys, others), expected)
    for wrong in ((queries, keys[:3], others), (queries, keys, others[:, :3]), (queries[0], keys[0], others)):
        with pytest.raises(UsageError, match=r"expected queries and keys \(b, d\) and negatives \(k, d\)"):
            info_nce(*wrong)


def contrast(model: torch.nn.Module, **settings: Any) -> MomentumContrast:
    torch.manual_seed(0)
    return MomentumContrast("coarse", model, 8, **settings)


def network(data: LabelledData) -> torch.nn.Module:
    return small_model(data, method="coins", options=replace(Coins(variant="moco"), mlp=8).network())


def test_the_queue_takes_turns(toy_data: LabelledData) -> None:
    """Five places, three keys a step: the oldest are replaced; of a batch larger than the queue the last stay."""
    term = contrast(network(toy_data), queue=5)
    first = term.queue.clone()
    torch.testing.assert_close(first.norm(dim=1), torch.ones(5))
    keys = torch.arange(24.0).view(3, 8)
    for number in range(2):
        term.fresh = keys + number
        term.step(0.1)
    assert torch.equal(term.queue, torch.stack([keys[2] + 1, keys[1], keys[2], keys[0] + 1, keys[1] + 1]))
    assert term.place.item() == 1 and not torch.equal(first, term.queue)
    term.fresh = torch.arange(56.0).view(7, 8)
    term.step(0.1)
    assert sorted(term.queue[:, 0].tolist()) == [16, 24, 32, 40, 48]


def test_the_slow_copy_follows(toy_data: LabelledData) -> None:
    """By the share that it does not keep, statistics of batch norms included; and nothing trains it."""
    model = network(toy_data)
    term = contrast(model, queue=4, momentum=0.75)
    before = {name: tensor.clone() for name, tensor in term.slow.state_dict().items()}
    assert before.keys() == model.state_dict().keys() and not list(term.parameters())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(2)
    term.follow(model)
    for name, tensor in term.slow.state_dict().items():
        step = 0.5 if tensor.is_floating_point() else 2
        torch.testing.assert_close(tensor, before[name] + step, msg=name)
    assert any("running_mean" in name for name in before)
    term.train()
    assert term.training and not any(part.training for part in term.slow.modules())


def test_weights_become_buffers() -> None:
    layers = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2), torch.nn.Linear(4, 4, bias=False))
    images = torch.rand(1, 1, 6, 6)
    before, names = layers.eval()(images), set(layers.state_dict())
    weights_as_buffers(layers)
    assert not list(layers.parameters()) and set(layers.state_dict()) == names
    assert torch.equal(layers(images), before)


def test_a_pair_of_views(toy_data: LabelledData) -> None:
    """The second view has an augmentation of its own, and the first is what it would be alone."""
    rows = torch.arange(9).numpy()
    data = DeviceData(toy_data, Preprocessing.from_data(toy_data.inputs), torch.device("cpu"))  # type: ignore[arg-type]
    options: dict[str, Any] = {"augmentation": Augmentation(crop=2), "key": 3, "draws": 0 * rows}
    single, pair = data.batch(rows, **options), data.batch(rows, **options, other=4)
    assert single.other is None and pair.other is not None and torch.equal(single.inputs, pair.inputs)
    assert torch.equal(pair.other, data.batch(rows, **{**options, "key": 4}).inputs)
    assert not torch.equal(pair.other, pair.inputs)
    part = pair.part(1, 3)
    assert part.other is not None and torch.equal(part.other, pair.other[1::3])


def test_it_learns_from_the_other_view(toy_data: LabelledData) -> None:
    """The queue is full of keys of the rows and the slow copy has moved by the end; what was made is not held back."""
    recipe = Coins(variant="moco-coarse", epochs=2, batch_size=16, steps_per_epoch=4, moco=Moco(queue=32, momentum=0.5))
    model = small_model(toy_data, method="coins", options=recipe.network())
    stage = next(iter(recipe.stages(model, toy_data)))
    _, term = Objective.of(stage.objective).weighted()[1]
    assert isinstance(term, MomentumContrast) and len(term.queue) == 32
    assert len(Objective.of(next(iter(Coins(variant="moco").stages(model, toy_data))).objective).terms[1].queue) == 120  # type: ignore[arg-type]
    run = quick(recipe, toy_data)
    assert [record["stage"] for record in run.history] == ["search", "search"]
    assert all(name.split(".")[0] in ("backbone", "projection", "classifier", "calibration") for name in
               run.model.state_dict()), "the slow copy is not shipped"  # fmt: skip


def test_stopped_in_an_epoch_it_ends_as_the_unbroken_run(
    toy_data: LabelledData, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, with batch norm: the slow copy, the queue and its place are in the checkpoint."""
    recipe = Coins(variant="moco-coarse", epochs=2, batch_size=16, steps_per_epoch=5, moco=Moco(queue=24, momentum=0.9))
    whole = quick(recipe, toy_data)
    step, taken = StageRun.step, []

    class Stop(Exception):
        pass

    def stopping(run: StageRun, *given: Any) -> None:
        if len(taken) == 7:
            run.save()
            raise Stop
        taken.append(1)
        step(run, *given)

    monkeypatch.setattr(StageRun, "step", stopping)
    with pytest.raises(Stop):
        quick(recipe, toy_data, tmp_path / "run")
    monkeypatch.setattr(StageRun, "step", lambda run, *given: (taken.append(1), step(run, *given))[1])
    again = quick(recipe, toy_data, tmp_path / "run")
    assert len(taken) == 10, "the seven steps before are not taken anew"
    assert_same_weights(again.model, whole.model)


def test_a_queue_holds_at_most_all_rows(toy_data: LabelledData) -> None:
    with pytest.raises(UsageError, match=r"moco.queue must be at most the number of rows, \d+; got 1,000,000"):
        quick(Coins(variant="moco", epochs=1, moco=Moco(queue=10**6)), toy_data)
