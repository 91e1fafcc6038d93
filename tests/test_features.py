"""What frozen layers make of the rows, computed once and kept: the same training, for less."""

from __future__ import annotations

import gc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from layers import VIEWS, full, layers, layers_of, recipe, train
from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.data.transforms import Augmentation, Preprocessing
from nestling.engine import features, room
from nestling.engine.features import Features
from nestling.engine.predict import predict
from nestling.engine.room import NoRoom
from nestling.engine.runtime import Runtime
from nestling.engine.stage import StageRun
from nestling.errors import Interrupted
from nestling.methods.prune import Compression
from nestling.models.layerwise import LayerwiseModel
from small import Crash, assert_same_weights

AFFINE = Augmentation.parse("affine", (1, 8, 8))


@pytest.fixture
def rows(toy_data: LabelledData) -> DeviceData:
    return DeviceData(toy_data, Preprocessing(1, 8, 8, (0.4,), (0.3,)), torch.device("cpu"))


@pytest.fixture
def model(toy_data: LabelledData) -> LayerwiseModel:
    return layers(toy_data)


def kept(data: DeviceData, modules: Any, numbers: Any = None, **options: Any) -> Features:
    numbers = np.arange(len(data)) if numbers is None else np.array(numbers)
    return Features(data, numbers, list(modules), Runtime.choose("cpu", "fp32"), **options)


# Maps ----------------------------------------------------------------------------------------------------------------


def test_maps_are_those_of_the_views(rows: DeviceData, model: LayerwiseModel) -> None:
    """Every view of every row, in whatever order they are asked for, and no matter in which mode the layers were."""
    model.train()
    found = kept(rows, model.blocks[:2], views=3, augmentation=AFFINE, key=5)
    assert all(module.training for module in model.modules())
    model.eval()
    chosen, draws = np.array([7, 3, 7, 200]), np.array([0, 4, 2, 1])
    batch = found.batch(chosen, None, 0, draws)
    expected = rows.batch(chosen, AFFINE, 5, draws % 3)
    with torch.no_grad():
        torch.testing.assert_close(batch.inputs, model.blocks[1](model.blocks[0](expected.inputs)))
    assert torch.equal(batch.labels, expected.labels) and torch.equal(batch.index, expected.index)
    assert not torch.equal(batch.inputs[0], batch.inputs[2]) and len(found) == 240
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)


def test_what_is_known_is_not_computed_again(rows: DeviceData, model: LayerwiseModel) -> None:
    calls = Counter[int]()
    for number, block in enumerate(model.blocks):
        block.register_forward_hook(lambda module, inputs, output, number=number: calls.update({number: len(output)}))
    first = kept(rows, model.blocks[:1])
    second = kept(rows, model.blocks[:2], before=first)
    assert calls == {0: 240, 1: 240}
    same = kept(rows, model.blocks[:2], before=second)
    assert same.maps is second.maps and calls == {0: 240, 1: 240}
    fresh = kept(rows, model.blocks[:2])
    assert torch.equal(fresh.maps, second.maps)


@pytest.mark.parametrize("what", ["weights", "statistics", "views", "key", "augmentation", "rows"])
def test_what_has_changed_is_computed_again(
    what: str, rows: DeviceData, model: LayerwiseModel, toy_data: LabelledData
) -> None:
    first: dict[str, Any] = {"views": 2, "augmentation": AFFINE, "key": 5}
    before, data = kept(rows, model.blocks[:1], **first), rows
    if what in ("weights", "statistics"):
        changed = model.blocks[0].conv.weight if what == "weights" else model.blocks[0].norm.running_mean  # type: ignore[union-attr]
        changed.data.add_(0.5)  # type: ignore[union-attr,operator]
    elif what == "rows":
        data = DeviceData(toy_data.subset(np.arange(239, -1, -1)), rows.preprocessing, rows.device)
    else:
        first[what] = {"views": 3, "key": 6, "augmentation": None}[what]
    after = kept(data, model.blocks[:1], before=before, **first)
    assert torch.equal(after.maps, kept(data, model.blocks[:1], **first).maps)
    assert after.maps.shape != before.maps.shape or not torch.equal(after.maps, before.maps)


def test_on_disk(rows: DeviceData, model: LayerwiseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where memory is short; the file has no name, so that a killed run leaves none behind."""
    expected, opened = kept(rows, model.blocks[:1]), []
    original = torch.from_file

    def from_file(name: str, **options: Any) -> torch.Tensor:
        opened.append((Path(name).parent.parent, options["size"]))
        return original(name, **options)

    monkeypatch.setattr(torch, "from_file", from_file)
    full(monkeypatch, 10**9)
    found = kept(rows, model.blocks[:1], folder=tmp_path)
    assert "of memory" in expected.place and "on disk" in found.place
    assert opened == [(tmp_path, expected.maps.numel())] and list(tmp_path.iterdir()) == []
    assert torch.equal(found.maps, expected.maps)
    again = kept(rows, model.blocks[:1], before=found, folder=tmp_path)
    del found
    gc.collect()
    assert torch.equal(again.maps, expected.maps) and len(opened) == 1


def test_no_room(rows: DeviceData, model: LayerwiseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    full(monkeypatch, 1000)
    model.train()
    with pytest.raises(NoRoom, match="more than half of what is free in memory and on disk"):
        kept(rows, model.blocks[:1], folder=tmp_path)
    assert model.blocks[0].norm.training and list(tmp_path.iterdir()) == []  # type: ignore[union-attr]


# Training on them ----------------------------------------------------------------------------------------------------

PRUNED = {"compression": Compression(share=0.5, epochs=1)}


def assert_close(one: nn.Module, other: nn.Module) -> None:
    mine, theirs = one.state_dict(), other.state_dict()
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_blocks": 5, "downsample_at": ()},
        {"norm": "batch", **PRUNED},
        VIEWS,
        {"together": 2},
        {"micro_batch": 10},
    ],
    ids=str,
)
def test_the_weights_are_those_of_a_run_without(options: dict[str, Any], toy_data: LabelledData) -> None:
    """In fp32, to 1e-6: also where the classifier of a pruned layer is tuned on kept maps."""
    with_maps, without = (layers_of(train(recipe(keep_features=k, **options), toy_data)) for k in (True, False))
    assert_close(with_maps, without)


def test_views_matter(toy_data: LabelledData) -> None:
    """Else the test above would say little."""
    one, other = (layers_of(train(recipe(**{**VIEWS, "views": views}), toy_data)) for views in (1, 3))
    assert not torch.equal(one.blocks[0].conv.weight, other.blocks[0].conv.weight)  # type: ignore[union-attr,arg-type]


class Work:
    """How many rows each block has computed, by stage: in steps, and before them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps, self.before = Counter[tuple[str, int]](), Counter[tuple[str, int]]()
        steps, data = StageRun.accumulate, StageRun.data

        def counted(original: Any, counter: Counter[tuple[str, int]]) -> Any:
            def run(stage: StageRun, *arguments: Any) -> Any:
                handles = []
                for number, block in enumerate(stage.engine.model.blocks):  # type: ignore[arg-type]

                    def count(
                        module: Any, inputs: Any, output: Any, where: Any = (stage.stage.name, number + 1)
                    ) -> None:
                        counter[where] += len(output)

                    handles.append(block.register_forward_hook(count))
                try:
                    return original(stage, *arguments)
                finally:
                    for handle in handles:
                        handle.remove()

            return run

        monkeypatch.setattr(StageRun, "accumulate", counted(steps, self.steps))
        monkeypatch.setattr(StageRun, "data", counted(data, self.before))


def test_each_layer_computes_each_view_once(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """192 training rows in 3 views; a step of layer j runs block j alone, however many are below."""
    work = Work(monkeypatch)
    train(recipe(num_blocks=4, **VIEWS, **PRUNED), toy_data)
    once = 192 * 3
    assert work.before == {("tune-1", 1): once, ("tune-2", 2): once, ("tune-3", 3): once, ("tune-4", 4): once}
    assert work.steps == {(f"layer-{j}", j): 2 * 16 * 24 for j in (1, 2, 3, 4)}


def test_without_augmentation_there_is_one_view(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    train(recipe(), toy_data)
    assert work.before == {("layer-2", 1): 192, ("layer-3", 2): 192}
    assert work.steps == {(f"layer-{j}", j): 144 for j in (1, 2, 3)}


def test_new_augmentations_are_not_kept(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    work = Work(monkeypatch)
    train(recipe(augmentation="affine", num_blocks=2), toy_data)
    assert work.before == {}
    assert work.steps == {("layer-1", 1): 144, ("layer-2", 1): 144, ("layer-2", 2): 144}


@pytest.mark.parametrize(
    ("disk", "says"), [(10**9, "on disk, more than half of the free memory"), (1000, ": not kept (1 MiB")]
)
def test_training_where_memory_is_short(
    disk: int,
    says: str,
    toy_data: LabelledData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On disk, or else as without kept maps; it is said, and nothing is left behind."""
    expected = layers_of(train(recipe(**VIEWS), toy_data))
    original = room.shutil.disk_usage
    full(monkeypatch, disk)
    run = train(recipe(**VIEWS), toy_data, tmp_path / "run", verbose=True)
    monkeypatch.setattr(room.shutil, "disk_usage", original)
    assert capsys.readouterr().err.count(says) == 2, "of layers 2 and 3"
    assert_close(layers_of(run), expected)
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".nestling-tmp")]


def test_other_maps_do_not_serve_it(rows: DeviceData, model: LayerwiseModel) -> None:
    """The risk is that of pictures without augmentation."""
    assert kept(rows, model.blocks[:1]).plain and kept(rows, model.blocks[:1], augmentation=Augmentation()).plain
    assert not kept(rows, model.blocks[:1], views=2).plain
    assert not kept(rows, model.blocks[:1], augmentation=AFFINE).plain


# Whose rows -----------------------------------------------------------------------------------------------------------


def test_only_the_rows_asked_for(rows: DeviceData, model: LayerwiseModel) -> None:
    seen = Counter[str]()
    model.blocks[0].register_forward_hook(lambda module, inputs, output: seen.update(rows=len(output)))
    some = kept(rows, model.blocks[:1], [200, 3, 7], views=2, augmentation=AFFINE, key=5)
    assert seen["rows"] == 6 and len(some) == 3
    chosen, draws = np.array([7, 200, 3, 7]), np.array([0, 1, 3, 1])
    every = kept(rows, model.blocks[:1], views=2, augmentation=AFFINE, key=5)
    found, expected = (maps.batch(chosen, None, 0, draws) for maps in (some, every))
    assert torch.equal(found.inputs, expected.inputs) and torch.equal(found.index, expected.index)
    # Of other rows nothing can be taken over.
    options = {"views": 2, "augmentation": AFFINE, "key": 5}
    others = kept(rows, model.blocks[:2], [7, 8, 200], before=some, **options)
    assert torch.equal(others.maps, kept(rows, model.blocks[:2], [7, 8, 200], **options).maps)


def test_a_stage_computes_its_rows_alone(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows without any label are not trained on."""
    work = Work(monkeypatch)
    train(recipe(num_blocks=2), toy_data.keep({"coarse": 0.5, "middle": 0.0, "fine": 0.0}, seed=0))
    assert list(work.before) == [("layer-2", 1)] and 90 <= work.before["layer-2", 1] <= 102


# A signal meanwhile ---------------------------------------------------------------------------------------------------


def test_a_signal_while_maps_are_computed(
    toy_data: LabelledData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "AT_ONCE", 50)
    expected = layers_of(train(recipe(**VIEWS), toy_data))
    computed: list[int] = []
    original = Features.compute

    def compute(self: Features, slots: np.ndarray, *arguments: Any) -> torch.Tensor:
        computed.append(len(slots))
        return original(self, slots, *arguments)

    monkeypatch.setattr(Features, "compute", compute)
    monkeypatch.setattr("nestling.interrupt.received", lambda: 15 if len(computed) == 2 else None)
    with pytest.raises(Interrupted, match="while the features of stage layer-2 are computed"):
        train(recipe(**VIEWS), toy_data, tmp_path / "run")
    assert computed == [50, 50]
    monkeypatch.setattr("nestling.interrupt.received", lambda: None)
    assert_same_weights(layers_of(train(recipe(**VIEWS), toy_data, tmp_path / "run")), expected)


def test_a_signal_while_rows_are_predicted(rows: DeviceData, model: LayerwiseModel) -> None:
    """Of some rows, in batches; the modes of the model are left as they were."""
    model.train()
    calls = []

    def obey() -> None:
        calls.append(1)
        if len(calls) == 3:
            raise Crash

    numbers, runtime = np.arange(100, 0, -1), Runtime.choose("cpu", "fp32")
    with pytest.raises(Crash):
        predict(model, rows, runtime, batch_size=10, rows=numbers, obey=obey)
    assert len(calls) == 3 and all(module.training for module in model.modules())
    found, labels = predict(model, rows, runtime, rows=numbers)
    expected, every = predict(model, rows, runtime)
    assert torch.equal(labels, every[numbers])
    torch.testing.assert_close(found.logits["layer-3"], expected.logits["layer-3"][numbers])
