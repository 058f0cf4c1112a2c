"""Translations of the sharded model, written by all ranks in step, and what they are worth: BLEU and ROUGE."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import distributed as dist

from lorasp.data.batches import spread
from lorasp.evaluation.beam_search import BeamSearch, Decoding
from lorasp.models.writing import Writing
from lorasp.recipe import RecipeError
from lorasp.zero.engine import Engine

TRANSLATIONS = "translations.txt"  # in the run's directory: a line a sentence of the test set
ROUGE = ("rouge1", "rouge2", "rougeL")


@torch.no_grad()
def translate(
    engine: Engine,
    sources: Sequence[tuple[int, ...]],
    how: Decoding,
    micro_batch_size: int,
    *,
    rank: int,
    world_size: int,
    device: torch.device,
    before_batch: Callable[[], None] = lambda: None,
) -> list[list[int]]:
    """The tokens of each source's translation, without EOS, on every rank. Collective.

    Sources of like length are written together, spread over the ranks; a rank whose own are done goes on until those
    of all ranks are, so that the forwards, and with them ZeRO-3's gathers, stay in step. before_batch: called on all
    ranks before each batch; what it raises ends it.
    """
    engine.train_mode(False)
    written: dict[int, list[int]] = {}
    for rows in _dealt([len(source) for source in sources], micro_batch_size, rank, world_size):
        before_batch()
        texts = write_batch(engine, [sources[row] for row in rows], how, device)
        written |= zip(rows, texts, strict=True)
    of_ranks: list[dict[int, list[int]]] = [{} for _ in range(world_size)]
    dist.all_gather_object(of_ranks, written)
    found = {row: text for of_rank in of_ranks for row, text in of_rank.items()}
    return [found[row] for row in range(len(sources))]


def _dealt(lengths: list[int], micro_batch_size: int, rank: int, world_size: int) -> list[list[int]]:
    """This rank's batches of rows, as many on every rank; the longest first: what has no room then fails at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    at_once = micro_batch_size * world_size
    batches = []
    for start in range(0, len(order), at_once):
        rows = order[start : start + at_once]
        batches.append(spread(rows, [lengths[row] for row in rows], world_size, micro_batch_size)[rank])
    return batches


@torch.no_grad()
def write_batch(
    engine: Engine,
    sources: list[tuple[int, ...]],
    how: Decoding,
    device: torch.device,
    stop_after: int | None = None,
) -> list[list[int]]:
    """The translations of this rank's sources, perhaps of none, written in step with the other ranks'. Collective.

    stop_after: so many forwards, what they give being no matter.
    """
    taken = sources or [(how.eos,)]  # a rank without work takes part in every gather
    search = BeamSearch(len(taken), how)
    lengths = tuple(map(len, taken))
    writing = Writing(lengths, how.beams, room=how.max_new_tokens)
    input_ids = torch.tensor([sum(taken, ())], device=device)
    tokens = [-1] * writing.rows
    while True:
        logits = engine(
            input_ids=input_ids,
            decoder_input_ids=torch.tensor([tokens], device=device),
            source_lengths=lengths,
            writing=writing,
        )
        tokens, parents = search.advance(logits)
        is_open = torch.tensor(bool(sources) and not search.is_done, dtype=torch.int32, device=device)
        dist.all_reduce(is_open)
        if writing.written == stop_after:
            return []
        if not is_open.item():
            return search.best() if sources else []
        if not search.is_done:
            writing.follow(torch.tensor(parents, device=device))


@dataclass(frozen=True)
class TranslationScore:
    """bleu: sacrebleu's corpus BLEU, 0 to 100, computed as its `signature` says. rouge: mean F1 of the sentences in
    %, by `ROUGE`'s names, as rouge-score gives it without stemming.

    rouge-score knows a to z and digits: it cuts Romanian words at ă, â, î, ș and ț, in both texts alike.
    """

    bleu: float
    signature: str
    rouge: dict[str, float]
    sentences: int

    @property
    def numbers(self) -> dict[str, float]:
        return {"bleu": self.bleu, **self.rouge}


def one_line(text: str) -> str:
    """A translation as a line of a file: line ends within it are spaces."""
    return re.sub(r"[\r\n]+", " ", text).strip()


def check_metrics() -> None:
    """Raises RecipeError where a library that scores is not installed."""
    missing = [name for name in ("sacrebleu", "rouge_score") if find_spec(name) is None]
    if missing:
        raise RecipeError(
            f"translation.test: {' and '.join(missing)} is not installed, which scores translations; "
            f"pip install 'lorasp[translation]'"
        )


def score_translations(translations: list[str], references: list[str]) -> TranslationScore:
    """translations and references: a sentence each, in the same order."""
    from rouge_score.rouge_scorer import RougeScorer
    from sacrebleu.metrics import BLEU

    bleu = BLEU()
    found = bleu.corpus_score(translations, [references])
    scorer = RougeScorer(ROUGE, use_stemmer=False)
    of_each = [scorer.score(*pair) for pair in zip(references, translations, strict=True)]
    rouge = {kind: 100 * sum(its[kind].fmeasure for its in of_each) / len(of_each) for kind in ROUGE}
    return TranslationScore(found.score, str(bleu.get_signature()), rouge, len(translations))
