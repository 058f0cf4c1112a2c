"""What a run teaches a model: `task_of` gives the recipe's task, whose methods are the stages that differ by it."""

from lorasp.recipe import Recipe
from lorasp.tasks.base import Task


def task_of(recipe: Recipe) -> Task:
    """The task that the recipe names."""
    if recipe.kind == "classification":
        from lorasp.tasks.glue import Glue

        return Glue(recipe)
    if recipe.kind == "translation":
        from lorasp.tasks.translation import Translation

        return Translation(recipe)
    from lorasp.tasks.causal_lm import CausalLanguageModeling

    return CausalLanguageModeling(recipe)
