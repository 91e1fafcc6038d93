"""``Predictor``: a trained model for paths, pictures and arrays as users have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nestling.data.images import decode
from nestling.data.text import SHOWN, AnyPreprocessing, TextEncoding
from nestling.engine.predict import concatenate
from nestling.engine.runtime import Runtime
from nestling.errors import DataError, StorageError, UsageError
from nestling.evaluate.answered import Backoff
from nestling.evaluate.backoff import DELTA, back_off
from nestling.evaluate.decide import describe_paths
from nestling.evaluate.scores import Scores, path_of
from nestling.evaluate.sets import classes_above, set_thresholds
from nestling.evaluate.unknowns import Alarm, alarm
from nestling.models.model import Answers, Model, Outputs
from nestling.taxonomy import Taxonomy


class Predictor:
    """Final. Answers at the granularity that the model can vouch for. ``nestling.from_pretrained`` makes one."""

    def __init__(
        self,
        model: Model,
        preprocessing: AnyPreprocessing,
        device: str = "auto",
        scores: Mapping[str, Scores] | None = None,
        init: str | None = None,
    ) -> None:
        self.runtime = Runtime.choose(device, "fp32")
        self.runtime.prepare(model)
        self.model = model.eval()
        self.preprocessing = preprocessing
        self.scores = dict(scores or {})
        """Of calibration and validation rows, on which a risk is guaranteed."""
        self.init = init
        """The run that training began from, whose own training rows a guarantee must not rest on."""

    @property
    def taxonomy(self) -> Taxonomy:
        """What the answers speak of."""
        return self.model.taxonomy

    def predict_proba(self, inputs: Sequence[Any] | np.ndarray | torch.Tensor) -> dict[str, np.ndarray]:
        """Calibrated, combined probabilities per level, float32 (n, width); every row sums to 1.

        ``inputs``: of a model for texts a sequence of strings; else a sequence of paths, PIL images or uint8 arrays
        ((h, w), (h, w, 1) or (h, w, 3)), or one uint8 array (n, h, w), (n, h, w, c), or tensor (n, c, h, w). Sizes
        other than the model's are cropped and resized.
        Raises DataError naming the input that cannot be read.
        """
        return {level: p.cpu().numpy() for level, p in self.answers(inputs).combined.items()}

    def predict(
        self,
        inputs: Sequence[Any] | np.ndarray | torch.Tensor,
        risk: float | None = None,
        *,
        guarantee: str = "ltt",
        delta: float = DELTA,
        per: str = "all",
        sets: bool = False,
        false_alarm: float | None = None,
    ) -> list[dict[str, Any]]:
        """For every input its path, the confidences along it, and the answer; as ``nestling predict --json``.

        With ``risk`` the answer is the deepest one of which at most that share is wrong, as ``back_off`` guarantees it
        with these options, or None; ``sets`` adds for every level the classes that hold the true one with probability
        at least 1 - risk. With ``false_alarm`` the key ``unknown`` says what is of no known class, as ``{"level",
        "text"}``, else None. Raises UsageError where the calibration rows are too few.
        """
        return self.describe(
            inputs,
            None if risk is None else self.back_off(risk, guarantee=guarantee, delta=delta, per=per),
            self.set_thresholds(risk) if sets else None,
            None if false_alarm is None else self.alarm(false_alarm),
        )

    def alarm(self, rate: float) -> Alarm:
        """When a path is called unknown; raises as ``evaluate.unknowns.alarm``."""
        return alarm(self.scores.get("calibration"), self.scores.get("validation"), rate)

    def back_off(self, risk: float, *, guarantee: str = "ltt", delta: float = DELTA, per: str = "all") -> Backoff:
        """The thresholds that keep a risk, and what they promise; raises as ``evaluate.backoff.back_off``."""
        parts = self.scores.get("calibration"), self.scores.get("validation")
        chosen = back_off(*parts, risk, guarantee=guarantee, delta=delta, per=per)
        if self.init is None:
            return chosen
        also = f"and as long as {self.init}, from which training began, has learned from none of them"
        return replace(chosen, text=f"{chosen.text}, {also}")

    def set_thresholds(self, risk: float | None) -> dict[str, float]:
        """For each level the least probability of a class in its prediction set; levels with too few rows are left out.

        Raises UsageError where all are.
        """
        if risk is None:
            raise UsageError("prediction sets need a risk: that the true class is not among them")
        return set_thresholds(self.scores.get("calibration"), risk)

    def describe(
        self,
        inputs: Sequence[Any] | np.ndarray | torch.Tensor,
        backoff: Backoff | None = None,
        sets: Mapping[str, float] | None = None,
        raised: Alarm | None = None,
    ) -> list[dict[str, Any]]:
        """``predict`` with what was worked out once for many inputs."""
        answers = self._answers(self.images(inputs))
        depth = None
        confidence, columns = path_of(answers, self.taxonomy, self.model.flat)
        if backoff is not None:
            widths = [self.taxonomy.num_classes(level) for level in answers.combined]
            depth = backoff.depth(confidence, columns, columns < np.array(widths))
        found = describe_paths(answers, self.taxonomy, self.model.flat, depth)
        if sets is not None:
            for result, chosen in zip(found, classes_above(answers.combined, self.taxonomy, sets), strict=True):
                result["sets"] = chosen
        if raised is not None:
            said = raised.describe(confidence, [result["path"] for result in found])
            for result, text in zip(found, said, strict=True):
                result["unknown"] = text
        texts = isinstance(self.preprocessing, TextEncoding)
        return [
            {"input": item[:SHOWN] if texts else name_of(item, row), **result}
            for row, (item, result) in enumerate(zip(inputs, found, strict=True))
        ]

    def embed(self, inputs: Sequence[Any] | np.ndarray | torch.Tensor) -> np.ndarray:
        """Pooled features, of texts with their words behind them, float32 (n, d): search compares directions."""
        return self._outputs(self.images(inputs)).embedding.cpu().numpy()

    def answers(self, inputs: Sequence[Any] | np.ndarray | torch.Tensor) -> Answers:
        """Probabilities as tensors, with the heads' own and the rejection beside the combined ones."""
        return self._answers(self.images(inputs))

    def images(self, inputs: Sequence[Any] | np.ndarray | torch.Tensor) -> torch.Tensor:
        """``inputs`` as uint8 (n, c, h, w) of the model's size and channels; texts encoded, int32."""
        size, channels = (self.preprocessing.height, self.preprocessing.width), self.preprocessing.channels
        if isinstance(inputs, str | bytes) or not isinstance(inputs, Sequence | np.ndarray | torch.Tensor):
            raise UsageError(f"expected a list of inputs, got {type(inputs).__name__}: put what there is in a list")
        if isinstance(self.preprocessing, TextEncoding):
            return self.preprocessing.encode([_text(item, row) for row, item in enumerate(inputs)])
        if isinstance(inputs, np.ndarray) and (inputs.ndim not in (3, 4) or inputs.dtype != np.uint8):
            mend = "put a single picture in a list" if inputs.dtype == np.uint8 else "pixels are 0 to 255"
            raise UsageError(
                f"expected a uint8 array (n, h, w) or (n, h, w, channels), got {inputs.dtype} {inputs.shape}: {mend}"
            )
        if isinstance(inputs, torch.Tensor):
            if inputs.ndim != 4 or inputs.dtype != torch.uint8:
                raise UsageError(f"expected a uint8 tensor (n, c, h, w), got {inputs.dtype} {tuple(inputs.shape)}")
            if tuple(inputs.shape[1:]) == (channels, *size):
                return inputs
            inputs = inputs.permute(0, 2, 3, 1).cpu().numpy()
        if len(inputs) == 0:
            return torch.empty((0, channels, *size), dtype=torch.uint8)
        return torch.from_numpy(
            np.stack(
                [decode(_picture(item, row), size, channels, name_of(item, row)) for row, item in enumerate(inputs)]
            )
        )

    def _answers(self, images: torch.Tensor) -> Answers:
        with torch.no_grad():
            answers = self.model.answers(self._outputs(images))
        for level, p in answers.combined.items():
            if not torch.isfinite(p).all():
                raise StorageError(f"the model's probabilities at level {level!r} are not finite: train it again")
        return answers

    @torch.no_grad()
    def _outputs(self, images: torch.Tensor, batch_size: int = 1024) -> Outputs:
        if len(images) == 0:
            # Layers differ in what they make of no rows at all.
            one = self._outputs(images.new_zeros((1, *images.shape[1:])))
            return Outputs(
                {name: logits[:0] for name, logits in one.logits.items()},
                {name: features[:0] for name, features in one.features.items()},
                one.embedding[:0],
            )
        parts = []
        for start in range(0, len(images), batch_size):
            batch = self.preprocessing(images[start : start + batch_size].to(self.runtime.device))
            parts.append(self.model(batch.contiguous(memory_format=torch.channels_last)))
        return concatenate(parts)


def _text(item: Any, row: int) -> str:
    if not isinstance(item, str):
        raise DataError(f"input {row}: the model reads texts, expected a string, got {type(item).__name__}")
    return item


def _picture(item: Any, row: int) -> Any:
    from PIL import Image

    if isinstance(item, str | Path):
        return Path(item)
    if isinstance(item, bytes | Image.Image):
        return item
    if not isinstance(item, np.ndarray):
        raise DataError(f"input {row}: expected a path, a PIL image or a uint8 array, got {type(item).__name__}")
    if item.dtype != np.uint8 or item.ndim not in (2, 3) or item.shape[2:] not in ((), (1,), (3,)) or not item.size:
        raise DataError(f"input {row}: expected a uint8 array (h, w) or (h, w, 3), got {item.dtype} {item.shape}")
    return item[:, :, 0] if item.shape[2:] == (1,) else item


def name_of(item: Any, row: int) -> str:
    """What an input is called in results and messages: its path, else its number."""
    return str(item) if isinstance(item, str | Path) else f"input {row}"
