"""Bundles: the folder that a trained model is shipped as. Safetensors and JSON; no pickle, no code."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from nestling import __version__
from nestling.data.transforms import Preprocessing
from nestling.errors import DataError, NestlingError, StorageError, UsageError
from nestling.evaluate.predictor import Predictor
from nestling.files import write_folder
from nestling.models.build import rebuild
from nestling.models.model import Model
from nestling.models.weights import restore
from nestling.taxonomy import Taxonomy

FORMAT = 1
FILES = ("model.safetensors", "config.json", "taxonomy.json")
LARGEST = 16 * 2**30
"""Bytes; a file past it is refused before it is read."""


@dataclass(frozen=True, eq=False)
class Bundle:
    """What a bundle folder holds."""

    model: Model
    preprocessing: Preprocessing
    config: dict[str, Any]


def save_bundle(
    path: Path | str, model: Model, preprocessing: Preprocessing, card: str | None = None, **about: Any
) -> None:
    """Write the bundle folder ``path``, whole or not at all.

    ``card`` is the README.md; ``about`` goes into config.json (source, seed, …) and must be JSON.
    """
    config = {
        "format": FORMAT,
        "nestling": __version__,
        "model": model.config,
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
        },
    )


def find_bundle(path: Path | str) -> Path:
    """The bundle of a run folder or of a bundle folder. Raises UsageError where there is none."""
    path = Path(path)
    for folder in (path / "model", path):
        if all((folder / name).is_file() for name in FILES):
            return folder
    if not path.exists():
        raise UsageError(f"there is no run {path}: give the folder that nestling train or demo printed")
    if (path / "recipe.toml").exists():
        raise UsageError(
            f"the run {path} is not finished: run the same training command again, it goes on where it stopped"
        )
    raise UsageError(
        f"{path} is neither a run nor a bundle ({', '.join(FILES)} are missing): give the folder that nestling train or demo printed"
    )


def load_bundle(path: Path | str) -> Bundle:
    """Read and check a bundle. Raises UsageError where there is none, StorageError where one is damaged or newer."""
    folder = find_bundle(path)
    contents = {}
    try:
        for name in FILES:
            if (folder / name).stat().st_size > LARGEST:
                raise StorageError(f"{folder / name} is larger than {LARGEST // 2**30} GiB: not a bundle of nestling")
            contents[name] = (folder / name).read_bytes()
        config = json.loads(contents["config.json"])
        if not isinstance(config, dict) or not isinstance(config.get("format"), int):
            raise StorageError(f"{folder / 'config.json'} is not a bundle's configuration")
        if config["format"] > FORMAT:
            raise StorageError(
                f"{folder} has format {config['format']}, newer than this nestling reads ({FORMAT}): update nestling"
            )
        taxonomy = Taxonomy.from_dict(json.loads(contents["taxonomy.json"]))
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
        model = rebuild(taxonomy, config["model"])
        restore(model, load(contents["model.safetensors"]), str(folder / "model.safetensors"))
    except StorageError:
        raise
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RecursionError,
        SafetensorError,
        DataError,
    ) as error:
        kind = "" if isinstance(error, NestlingError) else f"{type(error).__name__}: "
        raise StorageError(f"the bundle {folder} is damaged ({kind}{error}): save it again, or train again") from error
    return Bundle(model.eval(), preprocessing, config)


def from_pretrained(path: Path | str, device: str = "auto") -> Predictor:
    """The predictor of a run folder or bundle folder, on ``device`` (auto, cpu, cuda, mps)."""
    bundle = load_bundle(path)
    return Predictor(bundle.model, bundle.preprocessing, device)
