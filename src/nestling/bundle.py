"""Bundles: the folder that a trained model is shipped as. Safetensors and JSON; no pickle, no code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from nestling import __version__
from nestling.data.decode import MAX_PIXELS
from nestling.data.sides import Sides
from nestling.data.split import one_of_each_group
from nestling.data.text import AnyPreprocessing, preprocessing_of
from nestling.engine.run import Run
from nestling.engine.runtime import Runtime
from nestling.errors import DataError, MissingExtraError, NestlingError, StorageError, UsageError, listed
from nestling.evaluate.predictor import Predictor
from nestling.evaluate.scores import Scores, scores_of
from nestling.files import write_folder
from nestling.models.build import rebuild
from nestling.models.model import Model
from nestling.models.weights import restore
from nestling.taxonomy import Taxonomy

FORMAT = 1
FILES = ("model.safetensors", "config.json", "taxonomy.json")
SCORES = "scores.safetensors"
"""Of calibration and validation rows: what any risk is guaranteed on. Absent where there are no such rows."""
ROWS = "rows.safetensors"
"""Marks of the rows that the run was given, by which they stay on their side of the cut whatever labels come later."""
ABOUT: dict[str, type] = {
    "source": str,
    "seed": int,
    "levels": list,
    "concepts": dict,
    "hold_out": dict,
    "init": str,
    "on_bad_image": str,
    "qualify_names": bool,
}
"""What config.json remembers for ``nestling evaluate``, where it says anything of it."""
LARGEST = 16 * 2**30
"""Bytes of weights; a file past it is refused before it is read."""
LARGEST_JSON = 64 * 2**20
"""Bytes of config.json and of taxonomy.json."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """What a bundle folder holds."""

    model: Model
    preprocessing: AnyPreprocessing
    config: dict[str, Any]
    scores: dict[str, Scores]
    """Of the ``calibration`` and ``validation`` rows, where there were any."""
    sides: Sides | None = None
    """Which rows it was trained and tested on, where that was kept."""

    @property
    def tree(self) -> Taxonomy:
        """The model's, with the classes that were held out of it."""
        held_out = self.config.get("hold_out")
        return self.model.taxonomy if held_out is None else Taxonomy.from_dict(held_out["taxonomy"])


def held_scores(run: Run) -> dict[str, Scores]:
    """The scores of the rows that a run was not trained on, by the names of a bundle's parts; computed now.

    Of calibration rows one for each group: a guarantee counts rows as independent, which those of a group are not.
    """
    runtime = Runtime.choose(str(next(run.model.parameters()).device.type), "fp32")
    found = {
        name: scores_of(run.model, run.preprocessing, rows, runtime)
        for name, rows in (("calibration", one_of_each_group(run.calibration)), ("validation", run.validation))
    }
    return {name: scores for name, scores in found.items() if scores is not None}


def save_bundle(
    path: Path | str,
    model: Model,
    preprocessing: AnyPreprocessing,
    card: str | None = None,
    scores: Mapping[str, Scores] | None = None,
    sides: Sides | None = None,
    **about: Any,
) -> None:
    """Write the bundle folder ``path``, whole or not at all.

    ``card`` is the README.md; ``scores`` are what ``held_scores`` gives, ``sides`` the rows that it was trained and
    tested on; ``about`` goes into config.json (source, seed, …) and must be JSON.
    """
    config = {
        "format": FORMAT,
        "nestling": __version__,
        "model": model.describe(),
        "preprocessing": preprocessing.to_dict(),
        **about,
    }
    if card is None:
        from nestling.report.card import render_card

        card = render_card(
            name=Path(path).resolve().parent.name,
            taxonomy=model.taxonomy,
            metrics={},
            settings=[],
            source=str(about.get("source", "")),
        )
    write_folder(
        path,
        {
            "model.safetensors": save({name: t.detach().cpu().contiguous() for name, t in model.state_dict().items()}),
            "config.json": json.dumps(config, indent=1, allow_nan=False).encode(),
            "taxonomy.json": json.dumps(model.taxonomy.to_dict(), indent=1, ensure_ascii=False).encode(),
            "README.md": card.encode(),
            **({SCORES: save(_tensors(scores))} if scores else {}),
            **({ROWS: save({name: torch.from_numpy(part) for name, part in vars(sides).items()})} if sides else {}),
        },
    )


def _tensors(scores: Mapping[str, Scores]) -> dict[str, torch.Tensor]:
    return {name: t for part, found in scores.items() for name, t in found.tensors(part).items()}


def find_bundle(path: Path | str) -> Path:
    """The bundle of a run or bundle folder. Raises UsageError where there is none, StorageError for parts of one."""
    path = Path(path)
    for folder in (path / "model", path):
        missing = [name for name in FILES if not (folder / name).is_file()]
        if not missing:
            return folder
        if len(missing) < len(FILES):
            raise StorageError(
                f"the bundle {folder} is damaged: {listed(missing)} missing; save it again, or train again"
            )
    if not path.exists():
        raise UsageError(f"there is no run {path}: give the folder that nestling train or demo printed")
    if (path / "recipe.toml").exists():
        raise UsageError(
            f"the run {path} is not finished: run the same training command again, it goes on where it stopped"
        )
    raise UsageError(
        f"{path} is neither a run nor a bundle ({', '.join(FILES)}): give the folder that nestling train or demo "
        "printed"
    )


def load_bundle(path: Path | str) -> Bundle:
    """Read and check a bundle. Raises UsageError where there is none, StorageError where one is damaged or newer."""
    folder = find_bundle(path)
    try:
        contents = {name: _read(folder / name) for name in FILES}
        config = json.loads(contents["config.json"])
        if not isinstance(config, dict) or type(config.get("format")) is not int or config["format"] < 1:
            raise StorageError(f"{folder / 'config.json'} is not a bundle's configuration: save the bundle again")
        if config["format"] > FORMAT:
            raise StorageError(
                f"{folder} has format {config['format']}, newer than this nestling reads ({FORMAT}): update nestling"
            )
        for name, kind in ABOUT.items():
            if not isinstance(config.get(name, kind()), kind):
                raise DataError(f"{name!r} in config.json must be {kind.__name__}, got {config[name]!r:.80}")
        taxonomy = Taxonomy.from_dict(json.loads(contents["taxonomy.json"]))
        if "concepts" in config:
            level, rows = config["concepts"]["level"], config["concepts"].get("rows", {})
            if config["concepts"].get("column") is not True or not isinstance(level, str):
                taxonomy.level_index(level)
            if not isinstance(rows, dict) or not all(type(count) is int for count in rows.values()):
                raise DataError(f"the rows of 'concepts' in config.json must be counts by name, got {rows!r:.80}")
        preprocessing = preprocessing_of(config["preprocessing"])
        tensors = load(contents["model.safetensors"])
        # On the meta device first: a bundle that asks for more weights than it holds must not take the memory for them.
        with torch.device("meta"):
            planned = rebuild(taxonomy, config["model"])
        check_weights(planned, tensors, preprocessing)
        model = rebuild(taxonomy, config["model"])
        restore(model, tensors, str(folder / "model.safetensors"))
        scores = _read_scores(folder / SCORES, model)
        sides = _read_sides(folder / ROWS)
    except (StorageError, MissingExtraError):
        raise
    # torch complains of impossible sizes by RuntimeError.
    except (
        OSError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        ArithmeticError,
        RuntimeError,
        SafetensorError,
    ) as error:
        kind = "" if isinstance(error, NestlingError) else f"{type(error).__name__}: "
        reason = " ".join(f"{kind}{error}".split())
        raise StorageError(f"the bundle {folder} is damaged ({reason:.300}): save it again, or train again") from error
    return Bundle(model.eval(), preprocessing, config, scores, sides)


def _read_scores(path: Path, model: Model) -> dict[str, Scores]:
    if not path.exists():
        return {}
    tensors = load(_read(path))
    parts = sorted({name.split(".")[0] for name in tensors})
    if not set(parts) <= {"calibration", "validation"}:
        raise DataError(f"{SCORES} holds scores of {listed(parts)}, expected those of calibration and validation rows")
    return {part: Scores.from_tensors(tensors, part, model.taxonomy) for part in parts}


def _read_sides(path: Path) -> Sides | None:
    if not path.exists():
        return None
    parts = {name: tensor.numpy() for name, tensor in load(_read(path)).items()}
    if set(parts) != {"train", "test"} or any(part.dtype != np.int64 or part.ndim != 1 for part in parts.values()):
        raise DataError(f"{ROWS} must hold marks of training and of test rows, int64 (n,)")
    return Sides(**parts)


def _read(path: Path) -> bytes:
    largest = LARGEST if path.suffix == ".safetensors" else LARGEST_JSON
    size = path.stat().st_size
    if size > largest:
        raise StorageError(f"{path} has {size:,} bytes, more than {largest:,}: it is not a file of a bundle")
    return path.read_bytes()


def check_weights(planned: Model, tensors: Mapping[str, torch.Tensor], preprocessing: AnyPreprocessing) -> None:
    """Raise DataError where tensors or preprocessing do not fit the model ``planned``, or cannot answer anything."""
    size = [preprocessing.channels, preprocessing.height, preprocessing.width]
    if planned.config["input_shape"] != size:
        raise DataError(
            f"the model takes images of shape {planned.config['input_shape']}, the preprocessing gives {size}"
        )
    if preprocessing.height * preprocessing.width > MAX_PIXELS:
        raise DataError(f"the model takes images of {size}, more than {MAX_PIXELS:,} pixels")
    expected = planned.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys())[:1]:
        raise DataError(f"the weights {name!r} stand in only one of model and file")
    for name, tensor in tensors.items():
        own = expected[name]
        if (own.shape, own.dtype) != (tensor.shape, tensor.dtype):
            raise DataError(
                f"the weights {name!r} are {tensor.dtype} of shape {list(tensor.shape)}, "
                f"expected {own.dtype} of shape {list(own.shape)}"
            )
        if not torch.isfinite(tensor).all():
            raise DataError(f"the weights {name!r} are not finite")
    for name in ("calibration.temperature", "calibration.rejection_temperature"):
        if not (tensors[name] > 0).all():
            raise DataError(f"{name!r} must be above 0, got {tensors[name].tolist()}")


def from_pretrained(path: Path | str, device: str = "auto") -> Predictor:
    """The predictor of a run folder or bundle folder, on ``device`` (auto, cpu, cuda, mps)."""
    bundle = load_bundle(path)
    return Predictor(bundle.model, bundle.preprocessing, device, bundle.scores, bundle.config.get("init"))
