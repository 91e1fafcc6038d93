"""The methods: each a recipe, whose ``stages`` is the paper's algorithm."""

from nestling.errors import unknown
from nestling.methods.baselines import EndToEnd as EndToEnd
from nestling.methods.baselines import FlatMarginal as FlatMarginal
from nestling.methods.coins import Coins as Coins
from nestling.methods.layerwise import Layerwise as Layerwise
from nestling.methods.nested import Nested as Nested
from nestling.methods.recipe import Optimizer as Optimizer
from nestling.methods.recipe import Recipe as Recipe
from nestling.methods.recipe import Stage as Stage
from nestling.methods.robust import Robust as Robust

RECIPES: dict[str, type[Recipe]] = {
    recipe.method: recipe for recipe in (Nested, EndToEnd, FlatMarginal, Layerwise, Robust, Coins)
}

__all__ = ["Coins", "EndToEnd", "FlatMarginal", "Layerwise", "Nested", "Optimizer", "Recipe", "Robust", "Stage"]


def recipe_class(method: str) -> type[Recipe]:
    """The recipe of a method by its name on the command line. Raises UsageError for an unknown one."""
    if method not in RECIPES:
        raise unknown("method", method, RECIPES)
    return RECIPES[method]
