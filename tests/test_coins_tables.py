"""The tables of search from coarse labels beside the papers' recipes, and what the figures are drawn from."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nestling.config import apply, read_config
from nestling.data.sources import load_data
from nestling.errors import UsageError
from nestling.evaluate.occlusion import covered, occlusion_maps, response, turned
from nestling.methods.coins import Coins, Moco
from nestling.models.build import build_model
from nestling.reproduce import TABLES
from nestling.reproduce.coins import STRONG
from nestling.reproduce.coins_imagenet import of_moco
from nestling.reproduce.coins_patches import PARTS, PATCHES, parts_of
from nestling.reproduce.coins_theory import THEORY
from nestling.reproduce.rows import Rows
from nestling.reproduce.table import Table

RECIPES = Path(__file__).parent.parent / "recipes"


def written(name: str) -> tuple[Coins, str]:
    settings = read_config(RECIPES / f"coins-{name}.toml")
    assert settings.pop("method") == "coins"
    backbone = settings.pop("backbone")
    return apply(Coins(), settings), backbone


def test_the_written_recipes_are_those_that_are_run() -> None:
    recipe, backbone = written("imagenet")
    assert backbone == "resnet50"
    assert recipe == replace(of_moco("paper", "moco-coarse"), moco=Moco(queue=65_536))
    recipe, backbone = written("cifar100")
    trial = next(t for t in TABLES["coins-cifar100"].trials("paper") if t.row == "coinsp")
    assert backbone == trial.backbone and recipe == replace(trial.recipe, num_proxies=10_000)  # type: ignore[type-var]
    recipe, backbone = written("sop")
    trial = next(t for t in TABLES["coins-grocery"].trials("paper") if t.row == "coinsp")
    assert (recipe.variant, recipe.epochs, recipe.batch_size, backbone) == ("coinsp", 90, 256, "resnet18")
    assert (recipe.epochs, recipe.batch_size, backbone) == (
        trial.recipe.epochs,
        trial.recipe.batch_size,
        trial.backbone,
    )


@pytest.mark.parametrize("name", ["imagenet", "sop", "cifar100"])
def test_the_written_recipes_fit_pictures_of_224(name: str) -> None:
    """On the meta device; ResNet-50 gives 2,048 features, and the head behind it 128."""
    recipe, backbone = written(name)
    data = load_data("digits", "train")
    with torch.device("meta"):
        model = build_model(data.taxonomy, (3, 224, 224), backbone, "coins", recipe.network())
        outputs = model(torch.empty(2, 3, 224, 224))
    assert outputs.embedding.shape == (2, 2048 if name == "imagenet" else 512)
    assert outputs.features["coarse"].shape == (2, 128)


@pytest.mark.parametrize("name", ["coins-imagenet", "coins-patches", "coins-theory"])
def test_the_paper_bears_its_claims_out(name: str) -> None:
    table: Table = TABLES[name]
    for claim in table.claims:
        assert claim.paper is None or claim.paper > claim.least, claim.id


@pytest.mark.parametrize(
    ("name", "prefixes"), [("coins-cifar100", [""]), ("coins-small", ["digit-pairs: ", "mnist: "])]
)
def test_strong_augmentation_is_the_only_difference(name: str, prefixes: list[str]) -> None:
    for scale in ("small", "paper"):
        trials = {trial.row: trial for trial in TABLES[name].trials(scale)}
        for prefix in prefixes:
            plain, strong = trials[f"{prefix}coins-imp"], trials[f"{prefix}{STRONG}"]
            assert strong.recipe.augmentation == "strong" != plain.recipe.augmentation
            assert replace(strong.recipe, augmentation=plain.recipe.augmentation) == plain.recipe
            assert (strong.rows, strong.backbone) == (plain.rows, plain.backbone)
    assert any(claim.less[0].endswith(STRONG) for claim in TABLES[name].claims)


def test_lambda_is_searched_where_the_choice_is() -> None:
    """The trainings of coins-imp are those of coins-choice, so that no second ones are needed."""
    mine = next(t for t in THEORY.trials("small") if t.row == "coins-imp")
    other = next(t for t in TABLES["coins-choice"].trials("small") if t.row == "digit-pairs")
    assert mine.trained_by() == other.trained_by() and mine.options["grid"] == other.options["grid"]


# What features respond to --------------------------------------------------------------------------------------------


def corner(images: Tensor) -> Tensor:
    """Features that look at the upper left 4x4 pixels, and at a constant."""
    seen = images[:, 0, :4, :4].float().mean((1, 2))
    return torch.stack([seen / 255, torch.ones(len(images))], dim=1)


def test_a_response_by_hand() -> None:
    """Covering what is seen turns (1, 1) to (0, 1), by 1 - cos 45 degrees; covering the rest turns nothing."""
    images = torch.full((2, 3, 12, 12), 255, dtype=torch.uint8)
    mask = torch.zeros(12, 12, dtype=torch.bool)
    mask[:4, :4] = True
    torch.testing.assert_close(response(corner, images, mask, 0), torch.full((2,), 1 - 0.5**0.5))
    assert response(corner, images, ~mask, 0).abs().max() < 1e-6
    each = torch.stack([mask, ~mask])
    torch.testing.assert_close(response(corner, images, each, 0), torch.tensor([1 - 0.5**0.5, 0.0]), atol=1e-6, rtol=0)
    assert covered(images, mask, 7)[:, :, :4, :4].unique().tolist() == [7]
    torch.testing.assert_close(turned(torch.eye(2), -torch.eye(2)), torch.tensor([2.0, 2.0]))


def test_a_map_shows_where() -> None:
    """Squares of 4, side by side: the one that is seen turns the features, no other does."""
    images = torch.full((1, 3, 12, 12), 255, dtype=torch.uint8)
    found = occlusion_maps(corner, images, 4, 4, 0)[0]
    torch.testing.assert_close(found[:4, :4], torch.full((4, 4), 1 - 0.5**0.5))
    assert found.count_nonzero() == 16 or found[4:].abs().max() < 1e-6
    overlapping = occlusion_maps(corner, images, 4, 2, 0)[0]
    assert overlapping[0, 0] > overlapping[5, 5] > 0 and overlapping[7:, 7:].abs().max() < 1e-6
    for side, stride in ((13, 1), (0, 1), (4, 0)):
        with pytest.raises(UsageError, match="expected a square of 1 to 12 pixels and a stride"):
            occlusion_maps(corner, images, side, stride, 0)


def test_the_parts_of_patches() -> None:
    """Apart from each other, together all that is drawn, of the sizes that they were made in."""
    data = load_data("patches", "all")
    images = data.images(np.arange(len(data)))
    parts = parts_of(images)
    assert tuple(parts) == PARTS and len(data) == 512
    every = torch.stack(list(parts.values()))
    assert torch.equal(every.any(0), (images != 127).any(1)) and every.sum(0).max() == 1
    sizes = [part.sum((1, 2)).float().mean().item() for part in parts.values()]
    assert sizes == pytest.approx([24 * 24, 12 * 12, 4], rel=0.02)


def test_patches_are_looked_at_whole() -> None:
    for trial in PATCHES.trials("small"):
        assert trial.rows == Rows(source="patches", train_split="all", split="all")
        assert len(set(trial.options["shown"])) == 4 and max(trial.options["shown"]) < 512
    json.dumps([trial.key() for trial in PATCHES.trials("paper")])
