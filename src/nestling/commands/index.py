"""``nestling index``: the features of every row of a source, in a folder that ``nestling search`` reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from nestling.bundle import load_bundle
from nestling.commands.reading import read_as
from nestling.commands.show import require_model
from nestling.commands.train import say
from nestling.data.catalogue import CATALOGUE
from nestling.data.dataset import LabelledData
from nestling.data.images import find_images, load_images
from nestling.data.sources import load_data
from nestling.data.tables import SUFFIXES
from nestling.data.text import TextEncoding, find_texts, loaded_for, read_texts
from nestling.errors import DataError, UsageError, listed
from nestling.evaluate.index import build_index, check_place, fingerprint
from nestling.evaluate.predictor import Predictor
from nestling.taxonomy import Taxonomy

if TYPE_CHECKING:
    from nestling.options import Index, Search, SourceOptions

Asked = TypeVar("Asked", "Index", "Search")


def index(command: Index) -> int:
    """Run the command; the folder is printed last."""
    command, predictor, seed = open_model(command)
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", Path(command.source).stem) or "source"
    out = Path(command.out or f"runs/index-{name}-{fingerprint(predictor)}")
    check_place(out)
    made = build_index(predictor, load_gallery(command, command.source, predictor, seed), command.source)
    made.write(out)
    say(f"{len(made)} rows of {command.source}, {made.features.shape[1]} features each")
    print(out)
    return 0


def open_model(command: Asked) -> tuple[Asked, Predictor, int]:
    """The command as its run reads sources, the trained model, and its seed. Raises as ``load_bundle``."""
    require_model(Path(command.run))
    bundle = load_bundle(command.run)
    predictor = Predictor(bundle.model, bundle.preprocessing, command.device)
    return read_as(bundle, command), predictor, bundle.config.get("seed", 0)


def load_gallery(command: SourceOptions, source: str, predictor: Predictor, seed: int) -> LabelledData:
    """Every row of a source, as the model takes it. A folder of texts, or of pictures without classes, has no labels.

    ``seed`` is the run's: of a set that is made, the rows are those that it was trained and tested on.
    """
    preprocessing = predictor.preprocessing
    form, reads = loaded_for(preprocessing), isinstance(preprocessing, TextEncoding)
    if isinstance(preprocessing, TextEncoding) and is_loose(source):
        data = loose_texts(source, preprocessing.most, command.on_bad_image == "skip")
    elif is_flat(source) and not reads:
        data = loose_pictures(source, form["image_size"], form["channels"], command.on_bad_image == "skip")
    else:
        data = load_data(
            source,
            "all",
            command.data_dir,
            command.taxonomy,
            command.level_names,
            **form,
            qualify_names=command.qualify_names,
            on_bad_image=command.on_bad_image or "error",
            seed=seed,
        )
    if isinstance(data.inputs, list) != reads:
        held, compared = ("pictures", "texts") if reads else ("texts", "pictures")
        raise UsageError(f"{source} holds {held}, and this model compares {compared}")
    for note in data.notes:
        say(note)
    return data


def loose_pictures(source: str, size: tuple[int, int], channels: int, skip: bool) -> LabelledData:
    """The pictures of a folder without class folders: rows without a label."""
    paths = find_images(source)
    items = [str(path) for path in paths]
    images, kept, notes = load_images(paths, items, image_size=size, channels=channels, skip_bad=skip)
    return unlabelled(images, [items[row] for row in kept.tolist()], notes)


def loose_texts(source: str, most: int, skip: bool) -> LabelledData:
    """The first ``most`` characters of the texts below a folder: rows without a label."""
    texts: dict[str, str] = {}
    errors: list[str] = []
    for path, text in read_texts(find_texts(source)):
        if isinstance(text, str):
            texts[path] = text[:most]
        elif skip:
            errors.append(str(text))
        else:
            raise text
    if not texts:
        raise DataError(f"{source}: no text can be read: {listed(errors, 3)}")
    notes = (f"texts that cannot be read and are left out ({len(errors)}): {listed(errors, 5)}",) if errors else ()
    return unlabelled(list(texts.values()), list(texts), notes)


def unlabelled(inputs: Any, items: Sequence[str], notes: tuple[str, ...] = ()) -> LabelledData:
    """Under a tree of one class, which no row is labelled with."""
    nothing = Taxonomy.from_paths(["unknown"], ["label"])
    return LabelledData(inputs, nothing.encode([[None]] * len(items)), nothing, items=tuple(items), notes=notes)


def is_named(source: str) -> bool:
    """Whether it names a set of the catalogue or the hub, whatever lies here: ``./digits`` is the folder."""
    return source in CATALOGUE or source.startswith("hf:")


def is_flat(source: str) -> bool:
    """Whether it is a folder whose pictures all lie directly in it."""
    return is_loose(source) and all(picture.parent == Path(source) for picture in find_images(source))


def is_loose(source: str) -> bool:
    """Whether it is a folder without a table in it."""
    path = Path(source)
    if is_named(source) or not path.is_dir():
        return False
    return not any(child.suffix in SUFFIXES for child in path.iterdir())
