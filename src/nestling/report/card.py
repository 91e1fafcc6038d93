"""The model card: README.md of a bundle, Markdown with the front matter that model hubs read."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from nestling.evaluate.decide import CONFIDENT
from nestling.report import summary
from nestling.report.content import Content, main_method, plain, shorten

if TYPE_CHECKING:
    from nestling.taxonomy import Taxonomy

CITATIONS = {
    "nested": """@inproceedings{achddou2021nested,
  title     = {Nested Learning for Multi-Level Classification},
  author    = {Achddou, Rapha{\\"e}l and Di Martino, J. Matias and Sapiro, Guillermo},
  booktitle = {IEEE International Conference on Acoustics, Speech and Signal Processing (ICASSP)},
  pages     = {2815--2819},
  year      = {2021},
  doi       = {10.1109/ICASSP39728.2021.9415076}
}""",
    "layerwise": """@inproceedings{belilovsky2019greedy,
  title     = {Greedy Layerwise Learning Can Scale to {ImageNet}},
  author    = {Belilovsky, Eugene and Eickenberg, Michael and Oyallon, Edouard},
  booktitle = {International Conference on Machine Learning (ICML)},
  year      = {2019}
}""",
    "robust": """@inproceedings{qian2020hierarchically,
  title     = {Hierarchically Robust Representation Learning},
  author    = {Qian, Qi and Hu, Juhua and Li, Hao},
  booktitle = {IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)},
  year      = {2020}
}""",
    "coins": """@inproceedings{xu2021weakly,
  title     = {Weakly Supervised Representation Learning with Coarse Labels},
  author    = {Xu, Yuanhong and Qian, Qi and Li, Hao and Jin, Rong and Hu, Juhua},
  booktitle = {IEEE/CVF International Conference on Computer Vision (ICCV)},
  year      = {2021}
}""",
}
SHOWN_CLASSES, FEW_ROWS = 30, 1000
NOTE = (
    "Accuracy: higher is better. Overconfidence: mean confidence − accuracy in points, nearer to 0 is better. "
    "ECE, the expected calibration error, and mistake distance, the edges of the tree between the wrong class and the "
    "right one: lower is better."
)
ANSWER = (
    f"An answer is the deepest level whose confidence is at least {CONFIDENT:.0%}, else the coarsest. Confidences "
    "were measured on rows like the training rows; on others they can be wrong."
)
CLOSED_WORLD = (
    "- It knows only the classes above: whatever else it is shown, it may name one of them, with high confidence."
)


def md(value: object, limit: int = 200) -> str:
    """Untrusted text as one line of plain Markdown: neither markup, nor HTML, nor the end of a table's cell."""
    text = shorten(value, limit).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = text.replace("://", "&#58;//")  # renderers make links of bare addresses
    return re.sub(r"([\\`*_{}\[\]#|~!$])", r"\\\1", text)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]], names: int) -> list[str]:
    rule = ["---"] * names + ["---:"] * (len(header) - names)
    return [f"| {' | '.join(row)} |" for row in (header, rule, *rows)]


def _front_matter(method: str, licence: str | None, searches: bool) -> list[str]:
    # JSON strings are YAML strings: nothing that stands in a name can end one.
    task = ("image-retrieval", "metric-learning") if searches else ("hierarchical-classification", "calibration")
    tags = ["nestling", *task, "coarse-labels", plain(method)]
    lines = ["---", "library_name: nestling"]
    lines += [f"license: {json.dumps(plain(licence))}"] if licence else []
    return [*lines, "tags:", *(f"- {json.dumps(tag)}" for tag in dict.fromkeys(tags)), "---", ""]


def _classes(taxonomy: Taxonomy) -> list[str]:
    lines = ["## Levels and classes", "", "From coarse to fine; every class has one parent in the level before it.", ""]
    for level in taxonomy.levels:
        names = taxonomy.classes[level]
        shown = ", ".join(md(name, 60) for name in names[:SHOWN_CLASSES])
        rest = f" and {len(names) - SHOWN_CLASSES:,} more, in `taxonomy.json`" if len(names) > SHOWN_CLASSES else ""
        lines.append(f"- **{md(level)}** ({len(names):,}): {shown}{rest}")
    return [*lines, ""]


def _results(content: Content) -> list[str]:
    columns = summary.columns(content)
    header = [
        "Method",
        "Test rows",
        *(f"{summary.METRICS[key]}{', ' + md(level) if level else ''}" for key, level, _ in columns),
    ]
    num_seeds, found = len(content.metrics.get("seeds") or []), summary.table(content)
    cells = [
        [md(m), md(condition.name), *(" ".join(x for x in (c.text, c.spread) if x) for c in row)]
        for condition in found
        for m, row in condition.rows
    ]
    spread = f"mean ± standard deviation over {num_seeds} seeds" if num_seeds > 1 else "one run"
    return [
        "## Results",
        "",
        *_table(header, cells, 2),
        "",
        f"On {found[0].num_rows:,} test rows, in per cent, {spread}. {NOTE}",
        "",
    ]


def _retrieval(content: Content) -> list[str]:
    """Recall@k by level, and mAP@R; empty where no features were compared."""
    found = content.metrics.get("retrieval") or {}
    if not found:
        return []
    ks = list(next(iter(found.values())))
    rows = [[md(level), *(f"{100 * shares[k]:.1f}" for k in ks)] for level, shares in found.items()]
    lines = ["## Search", "", *_table(["Level", *(f"Recall@{k}" for k in ks)], rows, 1), ""]
    share = "In per cent: the test rows that have one of their class among their k nearest others, by cosine similarity"
    lines += [f"{share} of the features that `embed` gives.", ""]
    for level, precise in (content.metrics.get("retrieval_at_r") or {}).items():
        values = {name: 100 * summary.number(precise, name) for name in ("map", "precision")}
        if values["map"] == values["map"]:
            figures = f"mAP@R {values['map']:.1f} %, R-precision {values['precision']:.1f} %"
            lines += [f"- **{md(level)}**: {figures}", ""]
    return lines


def _calibration(content: Content) -> list[str]:
    lines = ["## Calibration", ""]
    for level in content.metrics.get("levels") or []:
        confidence, accuracy, ece = (100 * summary.number(level, key) for key in ("confidence", "accuracy", "ece"))
        if confidence == confidence and accuracy == accuracy:
            error = f"; expected calibration error {ece:.1f} %" if ece == ece else ""
            figures = f"mean confidence {confidence:.1f} %, accuracy {accuracy:.1f} %{error}"
            lines.append(f"- **{md(level['name'])}**: {figures}")
    return [
        *lines,
        "",
        ANSWER,
        "",
    ]


def _worse(content: Content) -> list[str]:
    """Where a baseline is better, plainly: beyond noise first, then where only its mean is."""
    main, finest, sure, unsure, decided = main_method(content), summary.level_names(content)[-1], [], [], set()
    for c in content.metrics.get("comparisons") or []:
        metric, where, rival = str(c["metric"]), summary.condition_of(c), str(c["baseline"])
        decided.add((rival, c.get("level"), metric, where))
        scale, unit = (1, "edges") if "distance" in metric else (100, "points")
        middle, low, high = (f"{scale * value:+.1f}" for value in (c["difference"], *c["interval"]))
        what = ", ".join(md(x) for x in (summary.METRICS.get(metric, metric), c.get("level"), where) if x)
        text = f"{what}: {md(main)} minus {md(rival)} is {middle} {unit} [{low}, {high}]."
        result = summary.outcome(content, c)
        if result == "worse":
            sure.append(f"- **{md(rival)} is better.** {text}")
        elif result == "open" and metric == "accuracy" and c.get("level") == finest and c["difference"] < 0:
            unsure.append(f"- {md(rival)} may be better; the difference is within noise. {text}")
    for where, methods in summary.conditions(content).items():
        ours = summary.number(summary.at_level(methods.get(main) or {}, finest), "accuracy")
        for rival, entry in methods.items():
            theirs = summary.number(summary.at_level(entry, finest), "accuracy")
            if theirs > ours and (rival, finest, "accuracy", where) not in decided:
                figures = f"{100 * theirs:.1f} % against {100 * ours:.1f} %"
                what = f"has the higher accuracy, {md(finest)}, {md(where)}: {figures}"
                unsure.append(f"- {md(rival)} {what} (no interval was computed).")
    return sure + unsure


def _limitations(content: Content) -> list[str]:
    lines, finest = _worse(content), summary.level_names(content)[-1]
    clean = f"{100 * summary.number(summary.at_level(content.metrics, finest), 'accuracy'):.1f} %"
    for name, entry in (content.metrics.get("distortions") or {}).items():
        level = summary.at_level(entry, finest)
        accuracy, gap = (100 * summary.number(level, key) for key in ("accuracy", "overconfidence"))
        if accuracy == accuracy and gap == gap:
            figures = f"accuracy, {md(finest)}, is {accuracy:.1f} % (clean: {clean}), overconfidence {gap:+.1f} points"
            lines.append(f"- Under {md(name)} {figures}.")
    if not content.metrics.get("methods"):
        lines.append("- It was not compared with any baseline.")
    rows = summary.table(content)[0].num_rows
    if 0 < rows < FEW_ROWS:
        lines.append(f"- Measured on {rows:,} test rows: differences of a few rows mean nothing.")
    return ["## Limitations", "", *lines, CLOSED_WORLD, ""]


def _purpose(content: Content, taxonomy: Taxonomy, searches: bool) -> str:
    """What the model is for, in a sentence or two."""
    if not searches:
        levels = ", ".join(md(level) for level in taxonomy.levels)
        return f"A classifier that answers at the deepest level it is confident of: {levels}."
    answered = ", ".join(md(level) for level in summary.level_names(content))
    also = f" It also classifies at the level it learned from: {answered}." if answered else ""
    return f"Features to search by: pictures of one class lie near each other, also at levels without labels.{also}"


def _usage(example: str, searches: bool) -> list[str]:
    """How to call it, from Python and from a shell."""
    given, typed = json.dumps(plain(example)), shlex.quote(plain(example))
    if searches:
        calls = [f"features = predictor.embed([{given}])  # compare their directions: cosine similarity"]
        command = f"nestling search path/to/this/folder {typed} --gallery path/to/pictures/ --html found.html"
    else:
        calls = [
            f"for row in predictor.predict([{given}]):",
            '    print(row["path"], row["confidence"], row["answer"])',
        ]
        command = f"nestling predict path/to/this/folder {typed} --json -"
    opened = ["import nestling", "", 'predictor = nestling.from_pretrained("path/to/this/folder")', *calls]
    return ["## How to use it", "", "```python", *opened, "```", "", "```sh", command, "```", ""]


def render_card(
    name: str,
    taxonomy: Taxonomy,
    metrics: Mapping[str, Any],
    settings: Sequence[tuple[str, object, str]],
    source: str,
    licence: str | None = None,
    label_budget: Mapping[str, float] | None = None,
    example: str = "picture.png",
) -> str:
    """The model card as Markdown.

    Parameters
    ----------
    name: the model's name. metrics: as in ``metrics.json``; may be empty for a model that was not evaluated.
    settings: (name, value, reason). source: what it was trained on. licence: SPDX name of the weights' licence.
    label_budget: level -> fraction of the training rows labelled at it; left out where not given.
    example: an input to show the use with: a file, or a text.
    """
    content = Content(title=name, source=source, metrics=metrics, taxonomy=taxonomy, settings=settings)
    method = main_method(content)
    budget = [
        f"- {md(level)}: {100 * fraction:.4g} % of the training rows are labelled"
        for level, fraction in (label_budget or {}).items()
    ]
    rows = [[md(setting), md(value), md(reason)] for setting, value, reason in settings]
    measured = _retrieval(content)
    if metrics.get("levels"):
        measured = [*_results(content), *measured, *_calibration(content), *_limitations(content)]
    searches, headline = bool(metrics.get("retrieval")), summary.headline(content)
    lines = [
        *_front_matter(method, licence, searches),
        f"# {md(name)}",
        "",
        f"{_purpose(content, taxonomy, searches)} Trained by the method *{md(method)}* of the library nestling.",
        "",
        *([f"**{md(headline.badge)}.** {md(headline.text, 500)}", ""] if metrics.get("levels") else []),
        *([md(metrics["verdict"], 2000), ""] if metrics.get("verdict") else []),
        *_usage(example, searches),
        *_classes(taxonomy),
        "## Training data and label budget",
        "",
        f"Trained on {md(source)}.",
        *(["", *budget] if budget else []),
        "",
        *(["## Settings", "", *_table(["Setting", "Value", "Reason"], rows, 3), ""] if rows else []),
        *measured,
        "## Citation",
        "",
        "```bibtex",
        CITATIONS.get(method, CITATIONS["nested"] if method.startswith("nested") else "\n".join(CITATIONS.values())),
        "```",
        "",
    ]
    return "\n".join(lines)
