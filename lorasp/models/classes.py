"""Which model learns which kind of task, and what its weights are read from."""

from pathlib import Path

from lorasp.models.causal_lm import CausalLM
from lorasp.models.classifier import SequenceClassifier
from lorasp.models.random_weights import RandomWeights
from lorasp.models.seq2seq_lm import Seq2SeqLM
from lorasp.models.task_model import TaskModel
from lorasp.models.weights import Checkpoint, load_config
from lorasp.recipe import Recipe


def model_class(recipe: Recipe) -> type[TaskModel]:
    """Of the recipe's task."""
    classes: dict[str, type[TaskModel]] = {
        "causal_lm": CausalLM,
        "classification": SequenceClassifier,
        "translation": Seq2SeqLM,
    }
    return classes[recipe.kind]


def open_weights(directory: Path, recipe: Recipe) -> Checkpoint | RandomWeights:
    """What the model's weights are read from. Raises RecipeError for a checkpoint that is damaged or none."""
    kind = model_class(recipe)
    config = kind.configured(load_config(directory, recipe.model), recipe)
    if recipe.model.weights == "stored":
        return kind.open(directory, config, recipe)
    trusted = recipe.model.trust_remote_code
    return RandomWeights(config, recipe.seed, directory, trust_remote_code=trusted, auto_class=kind.auto_class)
