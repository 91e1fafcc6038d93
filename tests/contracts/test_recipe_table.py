"""One row for every method: what its stages keep to, and settings that it refuses. A class without a row fails."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pytest
import torch
from discover import final_subclasses

from nestling.config import apply, to_dict
from nestling.data.dataset import LabelledData
from nestling.errors import UsageError
from nestling.methods import RECIPES
from nestling.methods.coins import Moco
from nestling.methods.prune import Compression
from nestling.methods.recipe import Context, Optimizer, Recipe, Select
from nestling.models.build import METHODS
from nestling.objectives.terms import Objective
from nestling.taxonomy import Taxonomy
from small import quick, small_model

QUICK = {"epochs": 1, "batch_size": 16, "steps_per_epoch": 2}


@dataclass(frozen=True)
class Row:
    method: str
    stages: tuple[str, ...]
    settings: dict[str, Any]
    wrong: dict[str, Any]
    message: str
    levels: tuple[str, ...] = ("coarse", "middle", "fine")
    """Those that the model answers at."""


TABLE = [
    Row(
        "nested",
        ("coarse", "middle", "fine", "temperature"),
        {},
        {"marginal": True, "reading": "exact"},
        "set marginal = false",
    ),
    Row(
        "nested",
        ("coarse", "middle", "fine", "rejection", "temperature"),
        {"marginal": False, "reading": "exact", "balance": "rows", "calibration": "both", "rejection_epochs": 1},
        {"calibration": "all"},
        "unknown calibration all",
    ),
    Row(
        "nested",
        ("coarse", "middle", "fine", "temperature"),
        {"concept_weights": "coarse", "concept_strength": 2.0},
        {"concept_strength": 0.0},
        "concept_strength must be above 0",
    ),
    Row("end-to-end", ("flat", "temperature"), {}, {"balance": "rows", "epochs": (1, 2)}, "2 values for 1 stages"),
    Row("flat-marginal", ("flat", "temperature"), {}, {"batch_size": 0}, "batch_size must be at least 1"),
    Row("layerwise", ("layer-1", "layer-2", "temperature"), {}, {"k": 0}, "k must be at least 1, got 0"),
    Row(
        "layerwise",
        ("layer-1", "layer-2", "temperature"),
        {"k": 2, "similarity": 0.9},
        {"similarity": 1.0},
        "similarity must be below 1, got 1.0",
    ),
    Row(
        "layerwise",
        ("layer-2", "reduced", "temperature"),
        {"k": 1, "together": 2, "final_aux_width": 3, "norm": "none", "balance": "rows", "augmentation": "none"},
        {"compression": Compression(share=0.5)},
        "compression needs layers of one convolution",
    ),
    Row("coins", ("search", "temperature"), {}, {"instance_weight": 0}, "instance_weight must be above 0", ("coarse",)),
    *(
        Row("coins", ("search", "temperature"), {"variant": variant, **settings}, wrong, message, levels)
        for variant, settings, wrong, message, levels in (
            ("ins", {}, {"optimizer": Optimizer(name="adamw")}, "set optimizer.name = 'sgd', got 'adamw'", ("coarse",)),
            ("cos", {"label_level": "middle"}, {"variant": "coz"}, "Did you mean 'cos'", ("coarse", "middle")),
            ("coins", {"unlabelled": "instance"}, {"unlabelled": "all"}, "unknown unlabelled all", ("coarse",)),
            ("coins-cos", {"learn_temperature": True}, {"temperature": 0}, "temperature must be above 0", ("coarse",)),
            ("coins-cos-mlp", {"mlp": 5}, {"mlp": 0}, "mlp must be at least 1", ("coarse",)),
            ("coinsp", {"epochs": 2}, {"num_proxies": 10**6}, "number of rows, 240; got 1000000", ("coarse",)),
            ("supcon", {}, {"label_level": "clade"}, "unknown level clade", ("coarse",)),
            ("supcon", {"learn_temperature": True}, {"temperature": -1.0}, "must be above 0, got -1.0", ("coarse",)),
            ("moco", {"moco": Moco(queue=7)}, {"moco": Moco(queue=0)}, "moco.queue must be at least 1", ("coarse",)),
            ("moco-coarse", {}, {"moco": Moco(momentum=1.5)}, "moco.momentum must be at least 0 and at", ("coarse",)),
            ("opt", {}, {"epochs": (1, 2)}, "2 values for 1 stages", ("coarse", "middle", "fine")),
        )
    ),
    Row("robust", ("robust", "temperature"), {}, {"strength": 0.0}, "strength, lambda, must be above 0, got 0.0"),
    Row(
        "robust",
        ("robust", "temperature"),
        {"tau": 0.0, "schedule": "auto", "balance": "rows", "steps_per_epoch": 12},
        {"tau": -1.0},
        "tau must be at least 0, got -1.0",
    ),
    Row(
        "robust",
        ("robust", "temperature"),
        {"smoothness": 2.0, "ascent": "group-dro", "norm": "none"},
        {"strength": "of"},
        "Did you mean 'off'",
    ),
    Row(
        "robust",
        ("robust", "temperature"),
        {"strength": "off", "tau": 0.0, "selection": "worst-concept"},
        {"strength": "off", "prior": ("a=1",)},
        "set strength to a number",
    ),
]


@pytest.fixture(params=TABLE, ids=lambda row: f"{row.method} {row.settings.get('variant', row.stages[-2])}")
def row(request: pytest.FixtureRequest) -> Row:
    return request.param


@pytest.fixture(scope="module")
def data(toy_data: LabelledData) -> LabelledData:
    return toy_data.keep({"middle": 0.6, "fine": 0.4})


def recipe_of(row: Row, **changes: Any) -> Recipe:
    return RECIPES[row.method](**{**QUICK, **row.settings, **changes})


def test_every_recipe_has_a_row() -> None:
    classes = final_subclasses("methods", Recipe)
    assert classes == {RECIPES[row.method] for row in TABLE} == set(RECIPES.values())
    assert set(RECIPES) == set(METHODS), "a method without a network, or the other way round"


def test_recipes_keep_to_the_rules(row: Row, data: LabelledData) -> None:
    recipe = recipe_of(row)
    model = small_model(data, method=row.method, options=recipe.network())
    generator = recipe.stages(model, data)
    assert inspect.isgenerator(generator), "later stages may depend on what earlier ones learned"
    stages = list(generator)
    assert tuple(stage.name for stage in stages) == row.stages and len(set(row.stages)) == len(stages)
    for stage in stages:
        assert stage.data is data
        assert stage.name.replace("-", "").isalnum(), "it becomes the name of a folder"
        if stage.rows is not None:
            assert stage.rows.dtype.kind == "i" and (np.diff(stage.rows) > 0).all()
        objective = Objective.of(stage.objective)
        mine = {id(p) for p in objective.parameters()} & {id(p) for p in model.parameters()}
        assert not mine, "a term holds weights of the model, which would be saved twice"
        for name in ("batch_size", "epochs"):
            assert isinstance(getattr(stage, name), int)
        assert stage.select is None or (isinstance(stage.select, Select) and stage.select.mode in ("min", "max"))


def test_walking_through_the_stages_is_deterministic(row: Row, data: LabelledData) -> None:
    """A resume replays them: the same names, rows and weights, from the same state."""
    found = []
    for _ in range(2):
        recipe, model = recipe_of(row), small_model(data, method=row.method)
        stages = list(recipe.stages(model, data))
        found.append(
            [(s.name, None if s.rows is None else s.rows.tolist(), s.lr, s.epochs, s.steps_per_epoch) for s in stages]
        )
    assert found[0] == found[1]


def test_settings_are_plain_values(row: Row) -> None:
    """Through JSON and back onto the defaults: fields are hyper-parameters, options and TOML keys at once."""
    recipe = recipe_of(row)
    assert apply(RECIPES[row.method](), json.loads(json.dumps(to_dict(recipe)))) == recipe
    assert {f.name for f in fields(Recipe)} <= {f.name for f in fields(recipe)}
    with pytest.raises(TypeError, match="positional"):
        RECIPES[row.method](3)  # type: ignore[misc]
    with pytest.raises(AttributeError, match="cannot assign"):
        recipe.epochs = 3  # type: ignore[misc]


def test_recipes_train(row: Row, data: LabelledData) -> None:
    """On partly labelled rows: probabilities at every level, sums of 1, figures of validation rows, in plain JSON."""
    run = quick(recipe_of(row), data)
    assert {record["stage"] for record in run.history} <= set(row.stages)
    json.dumps([run.metrics, run.history, [value for _, value, _ in run.decisions]])
    assert tuple(run.metrics["accuracy"]) == row.levels
    assert not run.model.training
    with torch.no_grad():
        answers = run.model.answers(run.model(run.preprocessing(data.images(np.arange(9)))))
    for level in row.levels:
        p = answers.combined[level]
        assert p.shape == (9, data.taxonomy.width(level)) and (p >= 0).all()
        torch.testing.assert_close(p.sum(1), torch.ones(9))


@pytest.mark.parametrize(
    "paths",
    [["a", "b", "c"], ["a/1", "a/2", "b"], ["a/1", "b/2"], ["x/a/1/i/A", "x/a/1/ii/B", "y/b/2/iii/C", "y/b/3/iv/D"]],
    ids=["one level", "ragged", "single children", "five levels"],
)
def test_recipes_train_on_any_tree(row: Row, paths: list[str]) -> None:
    taxonomy = Taxonomy.from_paths(paths)
    generator = np.random.default_rng(0)
    images = torch.from_numpy(generator.integers(0, 256, (60, 3, 9, 11), dtype=np.uint8))
    rows = [paths[number] for number in np.arange(60) % len(paths)]
    data = LabelledData(images, taxonomy.encode(rows), taxonomy)
    if row.method == "nested" and row.settings.get("reading") == "exact":
        # Its stages see disjoint rows: some must end at every level.
        labels = data.labels.copy()
        for number in range(60):
            labels[number, 1 + number % len(taxonomy.levels) :] = -1
        data = LabelledData(images, labels, taxonomy)
    settings = {"label_level": None} if row.settings.get("label_level") else {}
    if "concept_weights" in row.settings:
        settings["concept_weights"] = taxonomy.levels[0]
    run = quick(recipe_of(row, **settings), data)
    with torch.no_grad():
        answers = run.model.answers(run.model(run.preprocessing(images[:5])))
    partly = row.levels[-1] != "fine"
    assert tuple(answers.combined) == (taxonomy.levels[:1] if partly else taxonomy.levels)
    assert all(torch.isfinite(p).all() for p in answers.combined.values())


def test_hooks_get_a_context_and_nothing_else(row: Row, data: LabelledData) -> None:
    recipe = recipe_of(row)
    for stage in recipe.stages(small_model(data, method=row.method), data):
        for name in ("after_step", "after_epoch", "at_end"):
            hook = getattr(stage, name)
            if hook is not None:
                (parameter,) = inspect.signature(hook).parameters.values()
                assert parameter.annotation in (Context, "Context")


def test_what_recipes_refuse(row: Row, data: LabelledData) -> None:
    def walk() -> None:
        recipe = recipe_of(row, **row.wrong)
        list(recipe.stages(small_model(data, method=row.method, options=recipe.network()), data))

    with pytest.raises(UsageError, match=row.message):
        walk()
