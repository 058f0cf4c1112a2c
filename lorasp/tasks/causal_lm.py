"""To go on with a text: instruction files, the loss of a response's tokens, held-out loss and exact match."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from transformers import PreTrainedConfig

from lorasp.data.batches import Batch, collate
from lorasp.data.examples import Example
from lorasp.data.load import RunData, download_data, load_data
from lorasp.data.random_tokens import random_tokens
from lorasp.evaluation.held_out import HeldOutScore, score_held_out
from lorasp.models.weights import load_config, load_tokenizer
from lorasp.rehearsal import rehearse_evaluation, worst_batch
from lorasp.tasks.base import Task
from lorasp.zero.engine import Engine
from lorasp.zero.launch import Ranks


class CausalLanguageModeling(Task):
    def download(self) -> None:
        download_data(self.recipe.data)

    def load_scorers(self) -> None:
        """There are none: torch counts what is right."""

    def read_data(self, directory: Path) -> RunData:
        recipe = self.recipe
        if recipe.data.is_random:
            return random_tokens(recipe, load_config(directory, recipe.model).get_text_config().vocab_size)
        return load_data(recipe, load_tokenizer(directory, recipe.model))

    def collate(self, examples: Sequence[Example], rows: Sequence[int]) -> Batch:
        return collate(examples, rows)

    def worst_batch(self, examples: Sequence[Example], micro_batch_size: int) -> Batch:
        return worst_batch(examples, micro_batch_size)

    def score(
        self,
        engine: Engine,
        data: RunData,
        ranks: Ranks,
        before_batch: Callable[[], None] = lambda: None,
        *,
        final: bool = True,
    ) -> HeldOutScore | None:
        if data.held_out is None:
            return None
        return score_held_out(
            engine,
            data.held_out.examples,
            self.recipe.evaluation.micro_batch_size,
            rank=ranks.rank,
            world_size=ranks.world_size,
            device=ranks.device,
            before_batch=before_batch,
        )

    def rehearse_scoring(self, engine: Engine, data: RunData, ranks: Ranks) -> None:
        if data.held_out is not None:
            largest = worst_batch(data.held_out.examples, self.recipe.evaluation.micro_batch_size)
            rehearse_evaluation(engine, largest, ranks.device)

    def highest_sound_loss(self, config: PreTrainedConfig) -> float:
        """Four times a uniform guess's, nats a token."""
        return 4 * math.log(config.get_text_config().vocab_size)
