"""What the stages of a run share once its model is sharded."""

from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lorasp.agreement import Agreement
from lorasp.evaluation.mmlu import MmluEvaluation
from lorasp.recipe import Recipe
from lorasp.reporting.run_log import RunLog
from lorasp.run import LoadedModel
from lorasp.tasks.base import TaskData
from lorasp.watchdog import Watchdog
from lorasp.zero.engine import Engine
from lorasp.zero.launch import Ranks


@dataclass(frozen=True)
class Session:
    """Of one run, on this rank. data, mmlu: None where no rows, or no questions of MMLU, are asked for.

    watchdog: ends a rank that stands still. agreement: on whether the ranks leave, or save.
    """

    recipe: Recipe
    ranks: Ranks
    log: RunLog
    run_dir: Path
    loaded: LoadedModel
    engine: Engine
    tokenizer: PreTrainedTokenizerBase | None
    data: TaskData | None
    mmlu: MmluEvaluation | None
    watchdog: Watchdog
    agreement: Agreement

    @classmethod
    def start(
        cls,
        recipe: Recipe,
        ranks: Ranks,
        log: RunLog,
        run_dir: Path,
        loaded: LoadedModel,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase | None,
        data: TaskData | None,
        mmlu: MmluEvaluation | None,
    ) -> "Session":
        """From now on the rank's progress is counted. Collective."""
        watchdog = Watchdog(ranks.rank, ranks.world_size, recipe.health.hang_seconds)
        engine.on_progress = [watchdog.count, log.advanced]
        agreement = Agreement(on_progress=watchdog.count)
        return cls(recipe, ranks, log, run_dir, loaded, engine, tokenizer, data, mmlu, watchdog, agreement)
