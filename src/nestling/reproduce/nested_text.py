"""Nested learning of texts beside logistic regressions on TF-IDF, one per level, combined by Equation 2."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.data.text import TextEncoding
from nestling.evaluate.decide import decide_levels
from nestling.models.model import Answers
from nestling.models.nested import NestedModel
from nestling.objectives.functional import combine_levels
from nestling.reproduce.measures import Trained, trained
from nestling.reproduce.nested import MARGINAL, OURS, Network, Setting, compare
from nestling.reproduce.nested_measures import accuracy, cells_of, conditions, decided, robustness
from nestling.reproduce.table import Cell, Claim, Floor, Place, Table, Trial

LINEAR = "TF-IDF and logistic regression"
ALONE = "regressions, no validation rows"
WORDS = "nested, its words alone"
STRENGTHS, ITERATIONS = (3.0, 10.0, 30.0, 100.0), 1000
"""Values of C, of which validation rows choose at each level, and the most steps of the solver."""
MARGIN = 0.01
"""By which it may be worse and is still called not worse."""
NETWORK = Network(backbone="text:48/64/96", dropout=0.3)

SETTINGS = {
    "smoke": Setting(
        source="newsgroups20", num_rows=150, known=(110, 40), network=Network(backbone="text:6/6"), epochs=(1, 1),
        test=60,
    ),
    "small": Setting(
        source="newsgroups20", num_rows=None, known=(10_183, 1_131), network=NETWORK, epochs=(14, 56), test=None
    ),
}  # fmt: skip


def beside_linear(trial: Trial, place: Place) -> list[Cell]:
    """The network on the test rows, and the regressions, which in the end learn from validation rows too, or not."""
    found = trained(trial, place)
    cells = cells_of(trial.row, decided(found.run.model, conditions(found, ())), found.test)
    answered = {WORDS: by_words(found), **linear(found.train, found.validation, found.test)}
    for row, answers in answered.items():
        cells += cells_of(row, {"clean": decide_levels(answers)}, found.test)
    return cells


def by_words(found: Trained) -> Answers:
    """What the linear model in the network answers by itself, without a temperature, combined by Equation 2."""
    model = found.run.model.eval()
    assert isinstance(model, NestedModel) and model.words is not None
    assert isinstance(found.run.preprocessing, TextEncoding)
    with torch.inference_mode():
        scores = model.words(found.run.preprocessing.encode(texts_of(found.test)).to(found.runtime.device))
    return combined({level: of_level.softmax(1).cpu() for level, of_level in scores.items()}, found.test)


def combined(separate: dict[str, Tensor], test: LabelledData) -> Answers:
    """Probabilities (n, width) of every level, by Equation 2."""
    none = {level: torch.zeros(len(test), dtype=torch.float64) for level in separate}
    together = combine_levels([each.double() for each in separate.values()], test.taxonomy)
    return Answers(dict(zip(separate, together, strict=True)), separate, none)


def linear(train: LabelledData, validation: LabelledData, test: LabelledData) -> dict[str, Answers]:
    """One regression per level on all rows labelled there, combined by Equation 2; by row of the table.

    Each has the C of the best accuracy on the validation rows. ``LINEAR`` then learns from these too.
    """
    learners = {ALONE: Regressions(train), LINEAR: Regressions(train, validation)}
    separate: dict[str, dict[str, Tensor]] = {row: {} for row in learners}
    for number, level in enumerate(test.taxonomy.levels):
        judged = validation.subset(np.flatnonzero(validation.labels[:, number] >= 0))
        right = {
            strength: (
                learners[ALONE].probabilities(number, strength, judged).argmax(1) == judged.labels[:, number]
            ).sum()
            for strength in (STRENGTHS if len(judged) else ())
        }
        best = max(STRENGTHS, key=lambda strength: right.get(strength, 0))
        for row, learner in learners.items():
            separate[row][level] = torch.from_numpy(learner.probabilities(number, best, test))
    return {row: combined(found, test) for row, found in separate.items()}


class Regressions:
    """Logistic regressions on the TF-IDF of some rows, one for each level and C that is asked for."""

    def __init__(self, *parts: LabelledData) -> None:
        from sklearn.feature_extraction.text import TfidfVectorizer

        self.taxonomy = parts[0].taxonomy
        self.vectorizer = TfidfVectorizer(sublinear_tf=True)
        self.features = self.vectorizer.fit_transform([text for part in parts for text in texts_of(part)])
        self.labels = np.concatenate([part.labels for part in parts])

    def probabilities(self, level: int, strength: float, asked: LabelledData) -> np.ndarray:
        """(n, width) of the rows that are asked."""
        from sklearn.linear_model import LogisticRegression

        rows = np.flatnonzero(self.labels[:, level] >= 0)
        with warnings.catch_warnings():
            # Of few rows twenty classes look like numbers.
            warnings.filterwarnings("ignore", "The number of unique classes", UserWarning)
            made = LogisticRegression(C=strength, max_iter=ITERATIONS).fit(
                self.features[rows], self.labels[rows, level]
            )
        found = np.zeros((len(asked), self.taxonomy.width(self.taxonomy.levels[level])))
        found[:, made.classes_] = made.predict_proba(self.vectorizer.transform(texts_of(asked)))
        return found


def texts_of(data: LabelledData) -> list[str]:
    assert isinstance(data.inputs, list)
    return data.inputs


def trials(scale: str) -> list[Trial]:
    """The library's own nested learning and flat + marginal. The paper has no such table: at its scale as at small."""
    at = SETTINGS.get(scale, SETTINGS["small"])
    ours, flat = compare("small" if scale == "paper" else scale, at, robustness, (OURS, MARGINAL))
    flat = replace(flat, options={**flat.options, "clean": True})
    return [replace(ours, measure=beside_linear, options={"also": [WORDS, LINEAR, ALONE]}), flat]


TEXT = Table(
    name="nested-text",
    paper="beyond Nested Learning for Multi-Level Classification",
    about="newsgroups20 with coarse labels for all rows and fine ones for 10 %: nested learning on hashed words and "
    "pairs of words with a linear model of TF-IDF in it, beside one logistic regression on TF-IDF per level "
    "(scikit-learn, C by validation rows), combined by Equation 2, which trains on the same labels, validation "
    "rows' included; the same without these beside it, and the network's own linear model by itself. Not worse is less "
    "than a point below.",
    trials=trials,
    floor=Floor(row=MARGINAL, column=accuracy("fine"), least=0.4),
    claims=[
        Claim(
            id=f"text-{level}-not-worse",
            text=f"nested learning's {level} accuracy is not a point below the regressions'",
            more=(OURS, accuracy(level)),
            less=(LINEAR, accuracy(level)),
            least=-MARGIN,
        )
        for level in ("coarse", "fine")
    ],
)
