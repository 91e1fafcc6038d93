"""The theory of search from coarse labels, checked on a trained model: Lemma 1, and the constants of Theorems 1 and 2.

*Weakly Supervised Representation Learning with Coarse Labels* (Xu et al. 2021), Sections 3.1 to 3.3. Its h(c, alpha,
beta) stands in a supplement that we do not have; Lemma 1's factor is what h bounds from below.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestling.data.dataset import LabelledData
from nestling.data.loader import DeviceData
from nestling.engine.predict import predict
from nestling.engine.run import Run
from nestling.engine.runtime import Runtime
from nestling.errors import UsageError
from nestling.objectives.instance_terms import InstanceTerm
from nestling.objectives.instances import average_rows

MOST_ROWS = 2000
"""Training rows that are looked at, at even distances."""
MOST_SCORES = 100_000_000
"""Between them and all rows: of a million rows a hundred are looked at."""
BLOCK = 1 << 23
"""Scores that are held at once."""


@dataclass(frozen=True, eq=False)
class Theory:
    """Of each row that was looked at, (m,) float64; what concerns fine classes is NaN where no fine label is known."""

    instance: Tensor
    """Pr{y^I | f, W^I}, among all training rows."""
    within: Tensor
    """The same among the rows of its coarse class."""
    coarse: Tensor
    """Pr{y^C | f, W^C}."""
    fine: Tensor
    """Pr{y^F | f, W^I}: the fine class among the means of the rows of each."""
    factor: Tensor
    """exp(f (mean row of the fine class - own row)), of Lemma 1."""
    size: int
    """z: the rows of the smallest fine class."""

    @property
    def bound(self) -> Tensor:
        """Lemma 1's for each row, with its own Pr{y^I} in place of the least one, alpha."""
        return self.size * self.instance * self.factor

    @property
    def lemma(self) -> Tensor:
        """Lemma 1 as it stands: z alpha exp(...), alpha the least Pr{y^I} of all."""
        return self.size * self.instance.min() * self.factor

    @property
    def constant(self) -> float:
        """c' of Theorem 2, for which its alpha' is the least Pr{y^I}."""
        return implied_constant(float(self.within.min()), float(self.instance.min()), float(self.coarse.min()))

    def figures(self) -> dict[str, Any]:
        """What metrics.json and the tables hold."""
        known = ~self.fine.isnan()

        def of(values: Tensor) -> dict[str, float]:
            return {"mean": float(values.mean()), "least": float(values.min())}

        found: dict[str, Any] = {"alpha": of(self.instance), "alpha within": of(self.within), "beta": of(self.coarse)}
        found |= {"constant": self.constant if isfinite(self.constant) else None, "rows": len(self.instance)}
        if known.any():
            fine, bound, lemma = (float(each[known].mean()) for each in (self.fine, self.bound, self.lemma))
            found["fine"] = {"measured": fine, "bound": bound, "lemma": lemma, "z": self.size}
            found["fine"]["violations"] = int((self.fine < self.bound * (1 - 1e-6))[known].sum())
        return found

    def rows(self) -> dict[str, list[float]]:
        """What the report draws; of rows with a fine label their probability and Lemma 1's bound."""
        known = ~self.fine.isnan()
        found = {"alpha": self.instance, "within": self.within, "beta": self.coarse}
        if known.any():
            found |= {"measured": self.fine[known], "bound": self.bound[known]}
        return {name: values.tolist() for name, values in found.items()}


def relaxed(alpha: float, beta: float, constant: float) -> float:
    """alpha' of Theorem 2: what instances told apart within coarse classes are worth among all of them."""
    return 1 / (1 / alpha + (1 - beta) * constant / beta)


def implied_constant(alpha: float, among_all: float, beta: float) -> float:
    """c' for which ``relaxed(alpha, beta, c')`` is ``among_all``; infinite where none is: beta is 1, or all is lost.

    ``alpha``: the probability of an instance within its coarse class; ``among_all``, which is no larger, among all.
    """
    if among_all == 0:
        return float("inf")
    lost = 1 / among_all - 1 / alpha
    return (0.0 if lost <= 0 else float("inf")) if beta >= 1 else max(lost, 0.0) * beta / (1 - beta)


@torch.no_grad()
def check_theory(features: Tensor, rows: Tensor, own: Tensor, classes: Tensor, fine: Tensor, coarse: Tensor) -> Theory:
    """Lemma 1 and what Theorems 1 and 2 are about, in float64, block by block.

    Parameters
    ----------
    features: (m, d), as the losses see them.
    rows: (n, d), W^I, as features are compared with them.
    own: (m,) int64, the row of each feature.
    classes, fine: (n,) int64, the coarse and the fine class of each row, -1 = not known.
    coarse: (m,), the probability of each feature's own coarse class.

    ``UsageError`` on other shapes, and without a feature.
    """
    shapes = {own.shape, coarse.shape, features.shape[:1]}
    if len(shapes) > 1 or not len(own) or {classes.shape, fine.shape} != {rows.shape[:1]}:
        raise UsageError(
            f"expected features (m, d), own and coarse (m,), rows (n, d), classes and fine (n,), got "
            f"{', '.join(str(tuple(each.shape)) for each in (features, own, coarse, rows, classes, fine))}"
        )
    features, rows = features.double(), rows.double()
    # A class beyond the others, of no row, so that there is one where nothing is known.
    num_fine = int(fine.max()) + 2
    means, counts = average_rows(rows, fine, num_fine), torch.bincount(fine[fine >= 0], minlength=num_fine)
    parts = []
    for block in torch.arange(len(features), device=features.device).split(max(BLOCK // len(rows), 1)):
        f, mine = features[block], own[block]
        scores = f @ rows.T
        target = scores.gather(1, mine[:, None])[:, 0]
        everyone = scores.logsumexp(1)
        scores.masked_fill_(classes != classes[mine][:, None], -torch.inf)
        relatives = scores.logsumexp(1)
        label, proxies = fine[mine], (f @ means.T).masked_fill_(counts == 0, -torch.inf)
        middle = torch.where(label >= 0, proxies.gather(1, label.clamp_min(0)[:, None])[:, 0], torch.nan)
        logs = target - everyone, target - relatives, middle - proxies.logsumexp(1), middle - target
        parts.append(torch.stack(logs).exp())
    instance, within, share, factor = torch.cat(parts, dim=1).cpu()
    size = int(counts[counts > 0].min()) if bool(counts.any()) else 0
    return Theory(instance, within, coarse.double().cpu(), share, factor, size)


def theory_of(run: Run, train: LabelledData, runtime: Runtime) -> Theory | None:
    """Of a trained model with instance rows, on ``train``, the data that it was given; None for one without.

    Rows that it was not trained on are left out. Fine labels, which training did not see, are those of the data.
    """
    terms = [term for objective in run.objectives.values() for term in objective.terms]
    term = next((term for term in terms if isinstance(term, InstanceTerm)), None)
    if term is None:
        return None
    taxonomy, level = train.taxonomy, term.output
    labels = taxonomy.columns(train.labels)
    at = np.full(max(int(train.index.max()), int(term.index.max(initial=-1))) + 1, -1)
    at[train.index] = np.arange(len(train))
    here = at[term.index]
    coarse_of, fine_of = (labels[here, number] for number in (taxonomy.level_index(level), -1))
    known = np.flatnonzero((here >= 0) & (coarse_of >= 0))
    if not len(known):
        return None
    count = min(len(known), MOST_ROWS, max(MOST_SCORES // len(term.index), 1))
    chosen = known[np.linspace(0, len(known) - 1, count).round().astype(np.int64)]
    runtime.prepare(run.model)
    rows = DeviceData(train.subset(here[chosen]), run.preprocessing, runtime.device)
    outputs, _ = predict(run.model, rows, runtime)
    # Apple's GPUs have no float64.
    device = torch.device("cpu") if runtime.device.type == "mps" else runtime.device
    term.to(device)
    arrays = (chosen, coarse_of, fine_of)
    own, classes, fine = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
    coarse = outputs.logits[level].to(device).double().softmax(1).gather(1, classes[own][:, None])[:, 0]
    return check_theory(outputs.features[level].to(device), term.rows.current(), own, classes, fine, coarse)
