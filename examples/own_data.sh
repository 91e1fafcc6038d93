#!/usr/bin/env bash
# A person's own data, from a folder to answers: makes a folder tree of pictures, hides labels, and runs
# lint -> train -> report -> predict -> search with nothing but documented commands.
#
#   examples/own_data.sh [FOLDER]      by default runs/own-data
#   SET=grocery examples/own_data.sh   photographs of groceries, where NESTLING_DATA holds them; else digits
#   ROWS=300 MINUTES=0.3 …             fewer pictures, less time
set -euo pipefail

out=${1:-runs/own-data}
set=${SET:-digits}
python=${PYTHON:-python3}
nestling() { "$python" -m nestling "$@"; }

if [ -e "$out" ]; then
  echo "$out is there already: delete it, or name another folder" >&2
  exit 2
fi
mkdir -p "$out"

echo "1. A folder tree of pictures. Where somebody noted the coarse class alone, the picture lies in the outer folder."
"$python" - "$out/pictures" "$set" "${ROWS:-600}" <<'PYTHON'
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from nestling import load_data

folder, name, rows = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
for split, count in (("train", rows), ("test", rows // 3)):
    data = load_data(name, split, first=count)
    if split == "train":
        levels = data.taxonomy.levels
        data = data.keep({levels[0]: 1.0, levels[1]: 0.6, levels[-1]: 0.3})
    for row, pixels in enumerate(data.images(np.arange(len(data))).permute(0, 2, 3, 1).numpy()):
        known = [code for code in data.labels[row] if code >= 0]
        classes = [data.taxonomy.classes[level][code] for level, code in zip(data.taxonomy.levels, known)]
        place = folder.joinpath(split, *classes)
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze()).save(place / f"{row}.png")
PYTHON

echo "2. What is wrong with it? (Exit code 3 would say: errors.)"
nestling lint "$out/pictures" --json "$out/lint.json"

echo "3. Train; the method is chosen by the labels."
nestling train "$out/pictures" --minutes "${MINUTES:-0.5}" --out "$out/run"

echo "4. The report is $out/run/report.html; in short:"
nestling show "$out/run"

one=$(find "$out/pictures/test" -name '*.png' | sort | sed -n 1p)
echo "5. What is in $one?"
nestling predict "$out/run" "$one" --json "$out/answers.json"

echo "6. Which of the pictures are most like it?"
nestling search "$out/run" "$one" --gallery "$out/pictures/train" -k 5 --json "$out/found.json" --html "$out/found.html"
