"""What ``--baselines`` trains beside a method: flat ones on its network, each at the learning rates of one grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nestling.commands.train import say
from nestling.data.dataset import LabelledData
from nestling.engine.plan import StagePlan
from nestling.engine.run import Run
from nestling.engine.runtime import Runtime
from nestling.errors import DivergedError, UsageError
from nestling.methods.baselines import EndToEnd, FlatMarginal
from nestling.methods.layerwise import Layerwise
from nestling.methods.recipe import Recipe
from nestling.methods.robust import Robust
from nestling.models.build import LayerOptions, NetworkOptions, SearchOptions

if TYPE_CHECKING:
    from nestling.commands.pipeline import Pipeline

RATES = {"adamw": (1e-3, 3e-3, 1e-2), "adam": (1e-3, 3e-3, 1e-2), "sgd": (0.03, 0.1, 0.3)}
"""The learning rates that every method chooses from on validation rows, with --baselines."""


def rivals(
    recipe: Recipe, rate_given: bool, stages: Sequence[StagePlan], concepts: str | None = None
) -> dict[str, list[Recipe]]:
    """By method, ``recipe``'s own first: at each learning rate of one grid, with as many steps.

    ``rate_given``: the method's own rate was set, and stays. ``concepts``: the level, or the column, of the method's
    concepts.
    """
    network = recipe.network()
    if isinstance(network, SearchOptions):
        raise UsageError(
            "--baselines compares classifiers of the finest level: compare search with its own rivals instead, "
            "--set variant=cos, ins, supcon or opt"
        )
    recipes: dict[str, Recipe] = {recipe.method: recipe}
    if isinstance(recipe, Layerwise):
        # Its own network, rows and loss, all layers at once.
        recipes["end-to-end"] = recipe.end_to_end(sum(stage.epochs for stage in stages))
    else:
        recipes |= {
            kind.method: twin(kind, recipe, network, stages, concepts)
            for kind in (EndToEnd, FlatMarginal)
            if kind.method != recipe.method
        }
    return {
        method: [one]
        if rate_given and method == recipe.method
        else [replace(one, optimizer=replace(one.optimizer, lr=rate)) for rate in RATES[one.optimizer.name]]
        for method, one in recipes.items()
    }


def twin(
    kind: type[EndToEnd] | type[FlatMarginal],
    recipe: Recipe,
    network: NetworkOptions | LayerOptions,
    stages: Sequence[StagePlan],
    concepts: str | None,
) -> Recipe:
    """A baseline with the steps, batches, augmentation and stopping rule of ``recipe``, whose stages are ``stages``.

    Where the recipe's worst concept chooses the epoch, so does the baseline's: else its concepts would fare worse for
    the choice alone.
    """
    trained = [stage for stage in stages if stage.chosen or stage.follows]
    rate = recipe.optimizer.lr
    epochs = sum(stage.epochs for stage in trained)
    steps = sum(stage.steps for stage in trained)
    nested = network if isinstance(network, NetworkOptions) else NetworkOptions(skips=False)
    return kind(
        epochs=epochs,
        steps_per_epoch=-(-steps // epochs),
        batch_size=max(stage.batch_size for stage in trained),
        optimizer=replace(recipe.optimizer, lr=rate[-1] if isinstance(rate, tuple) else rate),
        norm=recipe.norm,
        skips=nested.skips,
        plain=nested.plain,
        hidden=nested.hidden,
        dropout=nested.dropout,
        balance="levels",
        augmentation=recipe.augmentation,
        patience=recipe.patience,
        selection="likelihood" if any(stage.chosen for stage in trained) else "last",
        worst_of=concepts if isinstance(recipe, Robust) and recipe.by_worst_concept else None,
    )


RATE = "learning rate of {}"
"""What a run folder keeps of the choice, by method."""


def best_rate(rates: Sequence[Any], losses: Mapping[Any, float], recipe: Recipe) -> tuple[Any, str]:
    """The learning rate of the least validation loss, and why; the usual one where no loss tells.

    ``losses``: of the rates that did not diverge, at least one; infinite without a validation row.
    """
    best = min(losses, key=lambda rate: losses[rate])
    if losses[best] == float("inf"):
        given = recipe.optimizer.lr
        usual = given[-1] if isinstance(given, tuple) else given
        return usual if usual in losses else best, "no validation row is labelled to choose by"
    compared = ", ".join(f"{rate}: {losses[rate]:.4f}" if rate in losses else f"{rate}: diverged" for rate in rates)
    return best, f"the least validation loss ({compared})"


def train_rivals(
    pipeline: Pipeline, train: LabelledData, validation: LabelledData | None, stages: Sequence[StagePlan]
) -> dict[str, Run]:
    """Every method at the learning rate that its own validation rows choose from one grid, with as many steps."""
    recipe, folder, device = pipeline.recipe, pipeline.folder, pipeline.device
    trainings = rivals(recipe, pipeline.rate_given, stages, recipe.concepts_at(train))
    runtime = Runtime.choose(device, pipeline.precision, folder.kept("precision"))
    if Runtime.choose(device, pipeline.precision).precision != runtime.precision:
        # A resume on another machine, which by itself would choose otherwise.
        pipeline.precision = runtime.precision
    folder.derive("precision", runtime.precision, runtime.reasons["precision"])
    if not folder.begun:
        folder.begin()
    total = sum(map(len, trainings.values()))
    chosen, number = {}, 0
    for method, recipes in trainings.items():
        given = pipeline.rate_given and method == recipe.method
        rates = [one.optimizer.lr for one in recipes]
        candidates: dict[Any, Run] = {}
        losses: dict[Any, float] = {}
        for rate, candidate in zip(rates, recipes, strict=True):
            number += 1
            say(f"--- training {number} of {total}: {method}, learning rate {rate}")
            name = method if given else f"{method}-{rate}"
            try:
                candidates[rate] = pipeline.fit(candidate, train, validation, folder.path / "methods" / name)
            except DivergedError as error:
                if given:
                    raise
                say(f"{error}")
                continue
            loss = candidates[rate].metrics.get("validation loss")
            losses[rate] = float("inf") if loss is None else loss
        if not candidates:
            raise DivergedError(f"{method} diverged at every learning rate tried: set another optimizer.name")
        best, reason = (rates[0], "as given") if given else best_rate(rates, losses, recipe)
        folder.derive(RATE.format(method), str(best), reason)
        chosen[method] = candidates[best]
    return chosen
