"""To classify sentences and pairs of them as one of GLUE's tasks has it, or to score their likeness (STS-B)."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from transformers import PreTrainedConfig

from lorasp.data.batches import evaluation_batches
from lorasp.data.glue import GlueBatch, GlueData, GlueExample, collate, download_glue, load_glue
from lorasp.evaluation.glue_metrics import glue_metrics, majority_baseline
from lorasp.glue import GLUE
from lorasp.models.weights import load_config, load_tokenizer
from lorasp.rehearsal import rehearse_evaluation
from lorasp.tasks.base import Task
from lorasp.zero.engine import Engine
from lorasp.zero.launch import Ranks

# Of few classes a uniform guess has so low a loss that a confident mistake of a small batch is several times that.
_HIGHEST_SOUND_LOSS = 20.0  # nats
_HIGHEST_SOUND_ERROR = 100.0  # four times the square of STS-B's whole range


@dataclass(frozen=True)
class SplitScore:
    """Of one set of rows. metrics: by name, the one that counts first; majority: those of one who always answers the
    same, see `majority_baseline`; loss: mean cross entropy, nats, or mean squared error.
    """

    metrics: dict[str, float]
    loss: float
    count: int
    majority: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        metric = next(iter(self.metrics))
        return {
            "metric": metric,
            "score": self.metrics[metric],
            "higher_is_better": True,
            "metrics": {**self.metrics, "loss": self.loss},
            "count": self.count,
            "majority": self.majority,
        }


@dataclass(frozen=True)
class GlueScore:
    """See `tasks.base.Score`. of: `reported`, and whatever else was scored."""

    of: dict[str, SplitScore]

    @property
    def numbers(self) -> dict[str, float]:
        """The reported metrics by their own names, the others' with the set's name before them."""
        chosen_on = self.of.get("selection", self.of["reported"])
        numbers = {"held_out_loss": chosen_on.loss}
        for name, score in self.of.items():
            before = "" if name == "reported" else f"{name.removeprefix('reported_')}_"
            numbers |= {f"{before}{metric}": value for metric, value in score.metrics.items()}
        return numbers

    @property
    def splits(self) -> Mapping[str, Mapping[str, Any]]:
        return {name: score.to_dict() for name, score in self.of.items()}

    @property
    def files(self) -> Mapping[str, str]:
        return {}

    @property
    def told(self) -> str:
        return "; ".join(
            f"{name.replace('_', ', ')}: "
            + ", ".join(
                f"{metric} {value:.4f}"
                + (f" (majority {score.majority[metric]:.4f})" if metric in score.majority else "")
                for metric, value in score.metrics.items()
            )
            + f", loss {score.loss:.4f}, {score.count:,} rows"
            for name, score in self.of.items()
        )


class Glue(Task):
    def download(self) -> None:
        download_glue(self.recipe.data)

    def load_scorers(self) -> None:
        glue_metrics(self._task.metrics, (0, 1), (0, 1))  # some parts are imported at their first use

    def read_data(self, directory: Path) -> GlueData:
        model = self.recipe.model
        kinds = getattr(load_config(directory, model), "type_vocab_size", 1)
        return load_glue(self.recipe, load_tokenizer(directory, model), tells_sentences_apart=kinds > 1)

    def collate(self, examples: Sequence[GlueExample], rows: Sequence[int]) -> GlueBatch:
        return collate(examples, rows, is_regression=self._task.is_regression)

    def worst_batch(self, examples: Sequence[GlueExample], micro_batch_size: int) -> GlueBatch:
        longest = sorted(examples, key=lambda example: -len(example.input_ids))[:micro_batch_size]
        return self.collate(longest, range(len(longest)))

    def score(
        self,
        engine: Engine,
        data: GlueData,
        ranks: Ranks,
        before_batch: Callable[[], None] = lambda: None,
        *,
        final: bool = True,
    ) -> GlueScore:
        engine.train_mode(False)
        found = {}
        for name, rows in data.scored.items():
            logits = self._logits(engine, rows.examples, ranks, before_batch)
            found[name] = self._split_score(logits, data.train.labels, rows.labels)
        return GlueScore(found)

    def rehearse_scoring(self, engine: Engine, data: GlueData, ranks: Ranks) -> None:
        examples = [example for rows in data.scored.values() for example in rows.examples]
        largest = self.worst_batch(examples, self.recipe.evaluation.micro_batch_size)
        rehearse_evaluation(engine, largest, ranks.device)

    def highest_sound_loss(self, config: PreTrainedConfig) -> float:
        return _HIGHEST_SOUND_ERROR if self._task.is_regression else _HIGHEST_SOUND_LOSS

    @property
    def _task(self):
        return GLUE[self.recipe.task]

    @torch.no_grad()
    def _logits(
        self, engine: Engine, examples: Sequence[GlueExample], ranks: Ranks, before_batch: Callable[[], None]
    ) -> torch.Tensor:
        """fp32 [examples, labels] on the CPU, the same on each rank: each computes its share. Collective."""
        mine: list[tuple[int, list[float]]] = []
        batches = evaluation_batches(
            examples, self.recipe.evaluation.micro_batch_size, ranks.rank, ranks.world_size, self.collate
        )
        for batch in batches:
            before_batch()
            logits = engine(**batch.model_inputs(ranks.device), score=True)
            mine += zip(batch.rows, logits.tolist(), strict=True)
        every = dict(pair for its in ranks.gather(mine) for pair in its)
        return torch.tensor([every[row] for row in range(len(examples))])

    def _split_score(self, logits: torch.Tensor, trained: Sequence[float], labels: Sequence[float]) -> SplitScore:
        task = self._task
        if task.is_regression:
            predictions, loss = logits[:, 0], F.mse_loss(logits[:, 0].double(), torch.tensor(labels).double())
        else:
            predictions, loss = logits.argmax(-1), F.cross_entropy(logits.double(), torch.tensor(labels))
        return SplitScore(
            metrics=glue_metrics(task.metrics, labels, predictions.tolist()),
            loss=loss.item(),
            count=len(labels),
            majority=majority_baseline(task.metrics, trained, labels, is_regression=task.is_regression),
        )
