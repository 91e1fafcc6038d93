"""The robust tables on other sets: deep features under a linear SVM (Tables 2 to 4), and fine-tuning (Figure 3)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F

from nestling.config import to_dict
from nestling.data.dataset import LabelledData
from nestling.data.sources import load_data
from nestling.engine.fit import fit
from nestling.engine.runtime import seeded
from nestling.evaluate.transfer import COSTS, svm_transfer
from nestling.methods.recipe import Context, Optimizer, Stage
from nestling.methods.robust import Robust
from nestling.models.build import build_model
from nestling.models.model import Model
from nestling.models.nested import NestedModel
from nestling.reproduce.measures import SINGLE, Trained, share, trained
from nestling.reproduce.robust import CL, DRO, EL, ERM, HRRL, METHODS, images, on_images, trial
from nestling.reproduce.table import Cell, Claim, Floor, Place, Table, Trial, better
from nestling.seeds import derive

NETWORK = "conv:32/64/128-128"
SIDE = 32
COARSE = "cifar10 at 16x16"
"""Brought to 16x16 and back: the concepts stay, the examples shift."""
TARGETS = (COARSE, "cifar10", "grocery", "fashion_mnist", "digits")
TAUS = (0.25, 0.5)


@lru_cache(maxsize=10)
def target_rows(target: str, split: str, data_dir: str | None, first: int | None) -> LabelledData:
    """The first rows of a target as 32x32 pictures in colour, held for the next trial of this process."""
    name = "cifar10" if target == COARSE else target
    side = SIDE // 2 if target == COARSE else SIDE
    data = load_data(name, split, data_dir, image_size=side, channels=3, first=first)
    if target != COARSE:
        return data
    assert isinstance(data.inputs, torch.Tensor)
    larger = F.interpolate(data.inputs.float(), size=(SIDE, SIDE), mode="bilinear", align_corners=False)
    return replace(data, inputs=larger.round().to(torch.uint8))


def transfer(trial: Trial, place: Place) -> list[Cell]:
    """The method at each ``tau`` of ``options``, and a linear SVM on its features of each of ``targets``.

    tau and C are chosen by cross-validation on the target's training rows; in a second column tau by validation on the
    source. ``costs``; ``folds``; ``first`` rows of a target.
    """
    options = trial.options
    networks = {
        f"{trial.row}, tau {tau:g}" if len(options["tau"]) > 1 else trial.row: trained(
            replace(trial, recipe=replace(trial.recipe, tau=tau)), place
        )
        for tau in options["tau"]
    }
    scores = {name: source_accuracy(name, found, found.validation).value for name, found in networks.items()}
    best = max(scores, key=lambda name: scores[name])
    cells = [replace(source_accuracy(trial.row, networks[best], networks[best].test), column="source")]
    for target in options["targets"]:
        train, test = (target_rows(target, split, place.data_dir, options["first"]) for split in ("train", "test"))
        found = svm_transfer(
            {name: (network.embed(train), network.embed(test)) for name, network in networks.items()},
            train.labels[:, -1],
            test.labels[:, -1],
            scores,
            options["costs"],
            options["folds"],
            place.seed,
        )
        assert found.by_source is not None
        cells += [
            Cell(trial.row, target, found.by_target.accuracy, count=len(test)),
            Cell(trial.row, f"{target}, tau by source", found.by_source.accuracy, count=len(test)),
        ]
        cells += [
            Cell(name, f"{target}, folds C {cost:g}", accuracy, count=len(train))
            for name, grid in found.grid.items()
            for cost, accuracy in grid.items()
        ]
    return cells


def source_accuracy(row: str, found: Trained, data: LabelledData) -> Cell:
    """On rows of the set that the network was trained for."""
    logits, labels = found.logits(data)
    return share(row, SINGLE, logits[found.level], labels)


def transfer_trials(scale: str) -> list[Trial]:
    options = {
        "targets": TARGETS,
        "costs": {"smoke": (0.1,), "small": (0.01, 0.1, 1.0), "paper": COSTS}[scale],
        "folds": 2 if scale == "smoke" else 3,
        "first": {"smoke": 500, "small": 2000, "paper": None}[scale],
    }
    return [
        trial(
            scale, name, on_images(scale, name), images(scale), transfer, NETWORK,
            {**options, "tau": TAUS if name in (EL, HRRL) and scale != "smoke" else (METHODS[name]["tau"],)},
        )
        for name in METHODS
    ]  # fmt: skip


PRINTED = {
    COARSE: {ERM: 0.8577, EL: 0.8662, CL: 0.8564, HRRL: 0.8649},
    "grocery": {ERM: 0.7347, EL: 0.7348, CL: 0.7434, HRRL: 0.7423},
    "digits": {ERM: 0.6323, EL: 0.6501, CL: 0.6547, HRRL: 0.6733},
}
"""Tables 2 to 4: cifar10 from ImageNet (the examples differ), SOP (concepts) and SVHN (both)."""
SHIFTS = {COARSE: "examples shift", "grocery": "concepts shift", "fashion_mnist": "both shift", "digits": "both shift"}


def gains(method: str, target: str) -> Claim:
    """A method's features serve better than ERM's."""
    known = PRINTED.get(target)
    return better(
        f"{method.lower()}-{target.split(' ')[0].replace('_', '-')}-{'coarse' if target == COARSE else 'as-is'}",
        f"{method} is above ERM on {target}, where {SHIFTS[target]}",
        method,
        ERM,
        round(known[method] - known[ERM], 4) if known else None,
        target,
    )


TRANSFER = Table(
    name="robust-transfer",
    paper="Hierarchically Robust Representation Learning, Tables 2 to 4",
    about="A linear SVM on the features of networks trained on tiny_imagenet32, whose coarse classes are the concepts. "
    "The paper's numbers are of ImageNet, and of cifar10, SOP and SVHN in the place of cifar10 at 16x16, grocery and "
    "digits. tau and C by three folds of the target's training rows (2,000 at most); the last blocks have the grid.",
    trials=transfer_trials,
    seeds={"smoke": 1, "small": 3, "paper": 3},
    floor=Floor(row=ERM, column="source", least=0.08),
    printed={(method, target): value for target, row in PRINTED.items() for method, value in row.items()},
    claims=[
        gains(EL, COARSE),
        gains(CL, "grocery"),
        *(gains(method, target) for target in ("fashion_mnist", "digits") for method in (EL, CL, HRRL)),
        gains(HRRL, COARSE),
        gains(HRRL, "grocery"),
        *(
            Claim(
                id=f"hrrl-keeps-{id}",
                text=f"HRRL loses less than a point to {method} on {target}",
                more=(HRRL, target),
                less=(method, target),
                least=-0.01,
            )
            for id, method, target in (("el", EL, COARSE), ("cl", CL, "grocery"))
        ),
        *(better(f"cl-dro-{t.replace('_', '-')}", f"CL is above group DRO on {t}", CL, DRO, None, t)
          for t in ("grocery", "fashion_mnist", "digits")),
    ],
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FineTuning(Robust):
    """Plain training of a network whose backbone comes from another; the accuracy after each epoch is noted.

    ``fit`` is given the test rows as those to choose by, and nothing is chosen: the last epoch is kept, and no
    temperature is fitted.
    """

    def stages(self, model: Model, data: LabelledData) -> Iterator[Stage]:
        yield replace(next(super().stages(model, data)), select=None, after_epoch=note_accuracy)


NOTED = "accuracy after epoch "


def note_accuracy(context: Context) -> None:
    """How often the network is right on the rows of the curve."""
    assert context.validation is not None
    outputs, labels = context.predict(context.validation)
    (logits,) = outputs.logits.values()
    right = (logits.argmax(1) == labels[:, -1])[labels[:, -1] >= 0].float().mean()
    context.note(f"{NOTED}{context.epoch + 1}", float(right), "of the curve; nothing is chosen by it")


def finetune(trial: Trial, place: Place) -> list[Cell]:
    """Accuracy on each of ``targets`` after every epoch of fine-tuning. ``options``: ``epochs``; ``first`` rows."""
    given = trained(trial, place)
    assert isinstance(given.run.model, NestedModel)
    epochs = trial.options["epochs"]
    recipe = FineTuning(
        tau=0.0, strength="off", epochs=epochs, batch_size=64, balance="rows", augmentation="crop-mirror",
        steps_per_epoch=trial.recipe.steps_per_epoch,
        optimizer=Optimizer(name="sgd", lr=0.01, weight_decay=1e-4, schedule="steps", drops=(0.5,), factor=10.0),
    )  # fmt: skip
    cells = []
    for target in trial.options["targets"]:
        first = trial.options["first"]
        train, test = (target_rows(target, split, place.data_dir, first) for split in ("train", "test"))
        with seeded(derive(place.seed, "head", target)):
            name = given.run.model.config["backbone"]
            model = build_model(train.taxonomy, train.image_shape, name, recipe.method, recipe.network())
        assert isinstance(model, NestedModel)
        model.backbone.load_state_dict(given.run.model.backbone.state_dict())
        folder = place.training(trial, target=target, first=first, tuned_by=to_dict(recipe))
        run = fit(
            recipe, train, model, folder, place.seed, place.device, place.precision, validation=test, verbose=False,
            whole=True,
        )  # fmt: skip
        noted = {name: value for name, value, _ in run.decisions if name.startswith(NOTED)}
        cells += [
            Cell(trial.row, f"{target} epoch {name.removeprefix(NOTED)}", float(str(value)), count=len(test))
            for name, value in noted.items()
        ]
    return cells


def finetune_trials(scale: str) -> list[Trial]:
    options = {
        "targets": FINETUNED,
        "epochs": EPOCHS[scale],
        "first": {"smoke": 300, "small": 2000, "paper": None}[scale],
    }
    recipes = {ERM: on_images(scale, ERM), HRRL: on_images(scale, HRRL)}
    return [
        trial(scale, name, recipe, images(scale), finetune, NETWORK, options)
        for name, recipe in recipes.items()
    ]  # fmt: skip


FINETUNED = ("cifar10", "grocery", "fashion_mnist")
EPOCHS = {"smoke": 1, "small": 10, "paper": 100}
"""Of fine-tuning."""


def at_the_last(epochs: int) -> dict[str, Any]:
    """What the table asks after its first epoch and its last."""
    return {
        "floor": Floor(row=ERM, column=f"cifar10 epoch {epochs}", least=0.3),
        "claims": [
            better(f"{t.replace('_', '-')}-{e}", f"{t}: HRRL's start is better after epoch {e}", HRRL, ERM, None,
                   f"{t} epoch {e}")
            for t in FINETUNED
            for e in sorted({1, epochs})
        ],
    }  # fmt: skip


FINETUNE = Table(
    name="robust-finetune",
    paper="Hierarchically Robust Representation Learning, Figure 3",
    about="Networks of tiny_imagenet32 as the start of plain training on other sets: test accuracy after every epoch. "
    "2,000 rows and 10 epochs at small; the paper has 100. No row of this table chooses anything of the fine-tuning.",
    trials=finetune_trials,
    **at_the_last(EPOCHS["small"]),
    scales={scale: at_the_last(EPOCHS[scale]) for scale in ("smoke", "paper")},
)
