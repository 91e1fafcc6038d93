"""How the epochs of a stage are compared on its own rows: without a copy of them, on kept maps where there are."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from layers import recipe, train
from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.engine.select import Judge
from nestling.engine.stage import StageRun


def test_the_training_risk_is_of_kept_maps(toy_data: LabelledData, monkeypatch: pytest.MonkeyPatch) -> None:
    """No copy of the pictures is made for it, and what is frozen is not computed again after every epoch."""
    options: dict[str, Any] = {"init": "identity", "downsample_at": ()}
    expected = train(recipe(keep_features=False, **options), toy_data)
    scored, copies = Counter[tuple[str, int]](), []
    original, made = StageRun.compare, DeviceData.__init__

    def compare(run: StageRun, judge: Judge) -> Any:
        handles = [
            block.register_forward_hook(
                lambda module, inputs, output, number=number: scored.update({(run.stage.name, number): len(output)})
            )
            for number, block in enumerate(run.engine.model.blocks, 1)  # type: ignore[arg-type]
        ]
        try:
            return original(run, judge)
        finally:
            for handle in handles:
                handle.remove()

    monkeypatch.setattr(StageRun, "compare", compare)
    monkeypatch.setattr(
        DeviceData, "__init__", lambda self, data, *more: (copies.append(len(data)), made(self, data, *more))[1]
    )
    run = train(recipe(**options), toy_data)
    # Two epochs, and the weights that layers 2 and 3 begin with.
    assert scored == {("layer-1", 1): 2 * 192, ("layer-2", 2): 3 * 192, ("layer-3", 3): 3 * 192}
    assert sorted(copies) == [24, 192]
    for ours, theirs in zip(run.history, expected.history, strict=True):
        assert ours["training risk"] == pytest.approx(theirs["training risk"], abs=1e-5)
