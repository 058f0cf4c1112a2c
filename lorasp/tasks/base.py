"""What differs between tasks: the data and how a batch is made of it, the loss that is too high, and the score."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lorasp.data.order import SampleOrder
from lorasp.recipe import Recipe
from lorasp.zero.engine import Engine
from lorasp.zero.launch import Ranks


class Item(Protocol):
    """What is trained at once: `input_ids` decide what it costs, `label_count` what it weighs in the loss."""

    input_ids: tuple[int, ...]
    label_count: int


class ItemBatch(Protocol):
    """A micro batch. Of no items it must still run, as a rank without work takes part in every gather."""

    lengths: tuple[int, ...]  # tokens of each item
    label_counts: tuple[int, ...]
    labels: torch.Tensor
    rows: tuple[int, ...]  # which items of the data set
    keys: tuple[int, ...]  # of each item in this step, for its dropout masks

    def model_inputs(self, device: torch.device | str) -> dict[str, Any]:
        """What the task's model takes: see `TaskModel`."""


class Examples(Protocol):
    examples: list[Item]


class TaskData(Protocol):
    """A run's data in the tokens of its model."""

    train: Examples
    tokenizer: PreTrainedTokenizerBase | None

    def order(self, recipe: Recipe) -> SampleOrder:
        """The order in which the run visits the training items."""

    def describe(self) -> list[str]:
        """Lines for the log: rows, and what was left out or cut."""

    def report(self) -> dict[str, Any]:
        """The data section of report.json; `digest` in it tells the rows of a resumed run from others."""

    def samples(self, count: int) -> list[dict[str, str]]:
        """`prompt` and `expected` of what is answered before and after training; none where nothing is."""


class Score(Protocol):
    """What the model was worth at one time.

    numbers: by the names that the report, its curves and the trackers know; `held_out_loss` is among them, by which
    the best checkpoint is kept. splits: `reported`, and `selection` where rows were set apart to choose settings on:
    each with its `metric` (the name of the one that counts), `score` (its value), `higher_is_better`, `metrics` by
    name and `count`. told: for a line of the log. files: texts for the run's directory, by name.
    """

    numbers: Mapping[str, float]
    splits: Mapping[str, Mapping[str, Any]]
    told: str
    files: Mapping[str, str]


class Task(ABC):
    """Of one run. Its model is `models.classes.model_class`'s."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe

    @abstractmethod
    def download(self) -> None:
        """Puts what the recipe's data names on the hub into its cache. Raises RecipeError."""

    @abstractmethod
    def load_scorers(self) -> None:
        """Imports the libraries that `score` needs, before anything is measured: their memory is not the run's.

        Raises RecipeError where one is not installed.
        """

    @abstractmethod
    def read_data(self, directory: Path) -> TaskData:
        """The data, checked, in the tokens of the model at `directory`. Raises RecipeError."""

    @abstractmethod
    def collate(self, examples: Sequence[Item], rows: Sequence[int]) -> ItemBatch:
        """The batch of `examples[row]` for each of `rows`."""

    @abstractmethod
    def worst_batch(self, examples: Sequence[Item], micro_batch_size: int) -> ItemBatch:
        """A batch that no `micro_batch_size` of the examples outdo in tokens or labels; one may never come."""

    @abstractmethod
    def score(
        self,
        engine: Engine,
        data: TaskData,
        ranks: Ranks,
        before_batch: Callable[[], None] = lambda: None,
        *,
        final: bool = True,
    ) -> Score | None:
        """Scores what is held out, spread over the ranks; None where nothing is. Collective; the same on all ranks.

        before_batch: called on all ranks before each forward; what it raises ends the scoring. final: also scores what
        takes too long to be scored before the end.
        """

    @abstractmethod
    def rehearse_scoring(self, engine: Engine, data: TaskData, ranks: Ranks) -> None:
        """The largest forward that `score` will need, on every rank. Collective."""

    @abstractmethod
    def highest_sound_loss(self, config: PreTrainedConfig) -> float:
        """The loss above which a run has diverged, where the recipe names none (health.max_loss)."""
