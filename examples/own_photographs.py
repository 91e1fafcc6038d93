"""From a folder of labelled pictures to answers: ``python examples/own_photographs.py [FOLDER]``.

The folders are the classes (``animal/cat/1.png``); a picture that lies higher up is labelled that far. Without a
folder, the example paints one: four textures in two families, two thirds of the pictures labelled by family alone.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

import nestling


def paint(folder: Path, per_class: int = 60) -> None:
    """Stripes and checks, fine and wide."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:16, :16]
    textures = {
        ("stripes", "upright"): x // 2 % 2,
        ("stripes", "flat"): y // 2 % 2,
        ("checks", "small"): (x // 2 + y // 2) % 2,
        ("checks", "large"): (x // 4 + y // 4) % 2,
    }
    for (family, kind), texture in textures.items():
        for number in range(per_class):
            noisy = 120 * np.roll(texture, rng.integers(8, size=2), (0, 1)) + rng.normal(60, 25, (16, 16))
            place = folder / family / kind if number % 3 == 0 else folder / family
            place.mkdir(parents=True, exist_ok=True)
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(place / f"{kind}-{number}.png")


def main(folder: Path, out: Path) -> None:
    """Learn, and answer for three pictures."""
    data = nestling.load_data(folder)
    print(data.taxonomy)
    recipe = nestling.methods.Nested(epochs=(2, 20), batch_size=32)
    run = nestling.fit(recipe, data, out=out, verbose=False)
    print("validation accuracy:", run.metrics["accuracy"])
    run.save_pretrained(out / "model")

    predictor = nestling.from_pretrained(out / "model")
    for answer in predictor.predict(sorted(folder.rglob("*.png"))[::80]):
        print(answer["path"], [round(c, 2) for c in answer["confidence"]], "->", answer["answer"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        if len(sys.argv) > 1:
            main(Path(sys.argv[1]), Path("runs/own-photographs"))
        else:
            paint(Path(scratch) / "textures")
            main(Path(scratch) / "textures", Path(scratch) / "run")
