"""What a stage is estimated to take where it keeps maps, and where its terms do not all take part from the start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from layers import VIEWS, layers, recipe
from nestling.data.dataset import LabelledData
from nestling.engine import sample
from nestling.engine.estimate import Estimate, busiest, estimate
from nestling.engine.fit import cut_rows
from nestling.engine.runtime import Runtime
from nestling.engine.stage import StageRun
from nestling.methods.prune import Compression
from nestling.methods.recipe import Recipe, Stage
from nestling.models.model import Model
from nestling.objectives.terms import CrossEntropy, Objective
from running import succeed
from small import recipe_of, small_model

CPU = Runtime.choose("cpu", "fp32")


def found(data: LabelledData, **options: Any) -> list[Estimate]:
    """Of layerwise training: three layers, whose maps are (4, 8, 8), (8, 4, 4) and (8, 4, 4)."""
    train, validation = cut_rows(data, None, 0)
    network = {name: options[name] for name in ("downsample_at", "norm") if name in options}
    return estimate(recipe(**options), layers(data, **network), train, validation, CPU, steps=1)


MAP = 4 * 4 * 8 * 8
"""Bytes of the first layer's, of one row; the second layer's has half of it."""


def test_kept_maps_are_counted(toy_data: LabelledData) -> None:
    """Of every row and view; while the second layer's are made, the first one's are there still."""
    for options, views in (({}, 1), (VIEWS, 3)):
        one, two, three, last = found(toy_data, **options)
        assert (one.maps.size, one.maps.held, one.maps.making) == (0, 0, 0)
        assert (two.maps.size, two.maps.place) == (192 * views * MAP, "memory")
        assert (two.maps.held, two.maps.making) == (two.maps.size, two.maps.size)
        assert (three.maps.held, three.maps.making) == (two.maps.size // 2, two.maps.size * 3 // 2)
        assert (last.maps.size, last.maps.held) == (0, three.maps.size)
        for e in (one, two, three, last):
            assert e.memory == e.parameters + max(e.optimizer + e.peak + e.maps.held, e.maps.making)
        assert two.maps.seconds > 0 and two.seconds > two.maps.seconds


def test_the_classifier_of_a_pruned_layer_is_tuned_on_the_next_ones_maps(toy_data: LabelledData) -> None:
    one, tuned, two, *_ = found(toy_data, compression=Compression(share=0.5, epochs=1))
    assert (tuned.name, two.name) == ("tune-1", "layer-2") and tuned.maps.size == two.maps.size > one.maps.size
    assert two.maps.making == two.maps.held and two.maps.seconds == 0 < tuned.maps.seconds


@pytest.mark.parametrize("place", ["memory", "disk", None])
def test_steps_are_measured_as_they_will_be(
    place: str | None, toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On maps nothing below is computed; where there is no room for these, all of it."""
    monkeypatch.setattr(sample, "choose", lambda size, device, folder: place)
    steps, every = Counter[tuple[str, int]](), Counter[int]()
    original = StageRun.accumulate
    network = layers(toy_data)
    for number, block in enumerate(network.blocks, 1):
        block.register_forward_hook(lambda module, inputs, output, number=number: every.update({number: len(output)}))

    def accumulate(run: StageRun, *arguments: Any) -> Any:
        before = Counter(every)
        result = original(run, *arguments)
        steps.update({(run.stage.name, number): count for number, count in (every - before).items()})
        return result

    monkeypatch.setattr(StageRun, "accumulate", accumulate)
    train, validation = cut_rows(toy_data, None, 0)
    two, three = estimate(recipe(), network, train, validation, CPU, steps=1)[1:3]
    ways = {(f"layer-{j}", i) for j in (1, 2, 3) for i in ((j,) if place else range(1, j + 1))}
    assert steps == dict.fromkeys(ways, 3 * 24)
    assert (two.maps.place, two.maps.size) == (place, 192 * MAP)
    assert (two.maps.held, three.maps.making) == ((192 * MAP, 288 * MAP) if place == "memory" else (0, 0))
    # A handful of rows stands for the 192, twice in each of two stages.
    assert every[1] - sum(count for (_, number), count in steps.items() if number == 1) <= 4 * sample.MAPPED


def test_terms_that_start_half_way_are_measured(toy_data: LabelledData) -> None:
    def activations(begins: float, ends: float = 1.0) -> int:
        def stages(recipe: Recipe, model: Model, data: LabelledData) -> Iterator[Stage]:
            late = Objective([(lambda progress: float(begins <= progress < ends), CrossEntropy("fine"))])
            yield Stage(
                name="only",
                data=data,
                objective=CrossEntropy("coarse") + late,
                trainable=model.parts("coarse"),
                optimizer=recipe.optimizer,
                lr=0.01,
                epochs=2,
                batch_size=24,
            )

        (one,) = estimate(recipe_of(stages), small_model(toy_data), toy_data, toy_data, CPU, steps=1)
        return one.activations

    always, never = activations(0.0), activations(2.0)
    assert activations(0.5) == activations(0.0, 0.3) == always > never


def test_the_busiest_step() -> None:
    early, late = (lambda p: 1.0 - (p > 0.5)), (lambda p: float(p >= 0.25))
    objective = Objective([(early, CrossEntropy("a")), (late, CrossEntropy("b")), (2.0, CrossEntropy("c"))])
    assert 25 <= busiest(objective, 100) <= 50
    assert 25_000 <= busiest(objective, 100_000) <= 50_000
    assert busiest(1.0 * CrossEntropy("a"), 7) == 6


def test_the_training_risk_is_estimated(toy_data: LabelledData) -> None:
    """It is of one level alone, though a classifier of the finest answers for all."""
    assert all(e.seconds > 0 for e in found(toy_data, init="identity", downsample_at=(), norm="none")[:3])


def test_a_dry_run_prints_the_maps(tmp_path: Path) -> None:
    small = ("--set", "k=1", "width=8", "num_blocks=2", "downsample_at=[]", "epochs=1", "augmentation=none")
    quick = ("--method", "layerwise", "--precision", "fp32", "--device", "cpu", *small)
    lines = succeed("train", "digits", *quick, "--out", tmp_path / "run", "--dry-run").out.splitlines()
    titles = next(line for line in lines if line.startswith("stage") and "memory" in line)
    assert titles.split()[4:7] == ["activations", "maps", "memory"]
    below = lines[lines.index(titles) + 1 :]
    assert below[0].split()[-5] == "-" or " - " in below[0]
    assert "kB (memory)" in below[1] or "MB (memory)" in below[1]
    assert not (tmp_path / "run").exists()
