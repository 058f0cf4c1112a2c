"""Held-out loss and exact match, from one forward an example."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist

from lorasp.data.batches import Batch, collate, evaluation_batches
from lorasp.data.examples import Example
from lorasp.zero.engine import Engine


@dataclass(frozen=True)
class HeldOutScore:
    """loss: mean cross entropy of a response token, nats. exact_match: share of examples, 0 to 1.

    An example matches when every token of its response, the end of sequence included, is the model's first choice
    given the true tokens before it. That is when greedy decoding writes exactly that response: by induction, as long
    as all choices were right, the true tokens before it are the ones it wrote itself. A response that was cut to fit
    data.max_length has lost its end, and is no match.
    """

    loss: float
    exact_match: float
    examples: int
    tokens: int

    @property
    def numbers(self) -> dict[str, float]:
        return {"held_out_loss": self.loss, "exact_match": self.exact_match}

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """See `tasks.base.Score`."""
        of_all = {"metrics": self.numbers, "count": self.examples}
        return {"reported": {"metric": "held_out_loss", "score": self.loss, "higher_is_better": False, **of_all}}

    @property
    def files(self) -> dict[str, str]:
        return {}

    @property
    def told(self) -> str:
        return f"loss {self.loss:.4f} nats a token, exact match {self.exact_match:.1%} of {self.examples}"


@torch.no_grad()
def score_held_out(
    engine: Engine,
    examples: list[Example],
    micro_batch_size: int,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
    collate: Callable[[Sequence[Example], Sequence[int]], Batch] = collate,
) -> HeldOutScore:
    """Scores each example once over all ranks. Collective; all ranks get the same score.

    before_batch: called on all ranks before each forward; what it raises ends the scoring. collate: of another task's
    batches.
    """
    engine.train_mode(False)
    totals = torch.zeros(4, dtype=torch.float64, device=device)
    for batch in evaluation_batches(examples, micro_batch_size, rank, world_size, collate):
        before_batch()
        losses, correct = engine(**batch.model_inputs(device), score=True)
        parts = zip(batch.rows, correct.split(batch.label_counts), strict=True)
        right = [part.all() & (not examples[row].cut) for row, part in parts if part.numel()]
        totals[0] += losses.sum()
        totals[1] += sum(right)
        totals[2] += len(right)
        totals[3] += losses.numel()
    dist.all_reduce(totals)
    loss, matches, count, tokens = totals.tolist()
    return HeldOutScore(loss / tokens, matches / count, int(count), int(tokens))
