"""To translate, WMT16's English into Romanian: pairs of sentences, held-out loss, and at the end BLEU and ROUGE."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from lorasp.data.examples import Example
from lorasp.data.load import DataSet, Part, RunData, read_train_and_held_out
from lorasp.data.pairs import PairBatch, collate_pairs, encode_pairs, read_pairs
from lorasp.data.rows import Rows
from lorasp.data.sources import hub_snapshot, is_on_hub
from lorasp.evaluation.beam_search import Decoding
from lorasp.evaluation.held_out import HeldOutScore, score_held_out
from lorasp.evaluation.translation import (
    TRANSLATIONS,
    TranslationScore,
    check_metrics,
    one_line,
    score_translations,
    translate,
    write_batch,
)
from lorasp.models.weights import load_tokenizer
from lorasp.recipe import Source
from lorasp.rehearsal import rehearse_evaluation
from lorasp.tasks.base import Task
from lorasp.zero.engine import Engine
from lorasp.zero.launch import Ranks


@dataclass(frozen=True)
class PairData(RunData):
    """Training and held-out pairs, and those whose translations are scored."""

    test: DataSet | None = None

    def samples(self, count: int) -> list[dict[str, str]]:
        """None: the translations of the test set are all there to be read."""
        return []

    def _sets(self) -> Iterator[tuple[str, DataSet]]:
        yield from super()._sets()
        if self.test is not None:
            yield "test", self.test

    def sources(self) -> list[tuple[int, ...]]:
        """The tokens of the test set's sources."""
        return [example.input_ids[: example.prompt_length] for example in self.test.examples]

    def references(self) -> list[str]:
        """The test set's targets, as the file has them."""
        return [part.rows.rows[row]["target"] for part in self.test.parts for row in part.encoded.rows]


@dataclass(frozen=True)
class PairScore:
    """Of held-out pairs the loss (of the test set where none are), of the test set at the end its translations.

    selects: whether the loss may choose settings, as it is not the test set's.
    """

    held_out: HeldOutScore
    test: TranslationScore | None
    translations: tuple[str, ...]
    selects: bool

    @property
    def numbers(self) -> dict[str, float]:
        return self.held_out.numbers | (self.test.numbers if self.test else {})

    @property
    def splits(self) -> dict[str, dict[str, Any]]:
        """See `tasks.base.Score`: settings are chosen by the held-out loss, BLEU is reported."""
        found = {}
        if self.selects:
            found["selection"] = self.held_out.splits["reported"]
        if self.test is not None:
            its = {"metric": "bleu", "score": self.test.bleu, "higher_is_better": True}
            metrics = {"metrics": self.test.numbers, "count": self.test.sentences}
            found["reported"] = {**its, **metrics, "bleu_signature": self.test.signature}
        return found

    @property
    def files(self) -> dict[str, str]:
        return {TRANSLATIONS: "".join(f"{line}\n" for line in self.translations)} if self.translations else {}

    @property
    def told(self) -> str:
        told = [self.held_out.told]
        if self.test is not None:
            rouge = ", ".join(
                f"{name.replace('rouge', 'ROUGE-')} {value:.2f}" for name, value in self.test.rouge.items()
            )
            told.append(f"BLEU {self.test.bleu:.2f} ({self.test.signature}), {rouge} of {self.test.sentences}")
        return "; ".join(told)


class Translation(Task):
    def download(self) -> None:
        for source in self._sources():
            if not Path(source.path).exists() and is_on_hub(source):
                hub_snapshot(source, download=True)

    def _sources(self) -> Iterator[Source]:
        yield from self.recipe.data.train_sources
        for source in (self.recipe.data.held_out_source, self.recipe.translation.test):
            if source is not None:
                yield source

    def load_scorers(self) -> None:
        if self.recipe.translation.test is not None:
            check_metrics()
            score_translations(["a"], ["a"])  # some parts are imported at their first use

    def read_data(self, directory: Path) -> PairData:
        recipe, data = self.recipe, self.recipe.data
        tokenizer = load_tokenizer(directory, recipe.model)

        def read(source: Source, empty_output: str = data.empty_output) -> Rows:
            return read_pairs(source, empty_output=empty_output)

        def encoded(rows: Rows, weight: float = 1.0) -> Part:
            return Part(rows, encode_pairs(tokenizer, rows, data.max_length, data.too_long), weight)

        train, held_out = read_train_and_held_out(recipe, read)
        weights = [source.weight for source in data.train_sources]
        test = None
        if recipe.translation.test is not None:
            check_metrics()
            # A sentence left out would make another test set, which no line of translations.txt would fit: of one
            # that is too long the source is cut, and an empty one is scored, as sacrebleu does it.
            rows = read(recipe.translation.test, "keep")
            test = DataSet((Part(rows, encode_pairs(tokenizer, rows, data.max_length, "truncate")),))
        return PairData(
            train=DataSet(tuple(encoded(rows, weight) for rows, weight in zip(train, weights, strict=True))),
            held_out=DataSet(tuple(encoded(rows) for rows in held_out)) if held_out else None,
            tokenizer=tokenizer,
            template="",
            test=test,
        )

    def collate(self, examples: Sequence[Example], rows: Sequence[int]) -> PairBatch:
        return collate_pairs(examples, rows)

    def worst_batch(self, examples: Sequence[Example], micro_batch_size: int) -> PairBatch:
        """The longest sources beside the longest targets."""
        sources = sorted((e.input_ids[: e.prompt_length] for e in examples), key=len, reverse=True)
        targets = sorted((e.input_ids[e.prompt_length :] for e in examples), key=len, reverse=True)
        worst = [
            Example(source + target, len(source))
            for source, target in zip(sources[:micro_batch_size], targets[:micro_batch_size], strict=True)
        ]
        return collate_pairs(worst, range(len(worst)))

    def score(
        self,
        engine: Engine,
        data: PairData,
        ranks: Ranks,
        before_batch: Callable[[], None] = lambda: None,
        *,
        final: bool = True,
    ) -> PairScore | None:
        held_out = test = None
        lines: tuple[str, ...] = ()
        size = self.recipe.evaluation.micro_batch_size
        how = {
            "rank": ranks.rank,
            "world_size": ranks.world_size,
            "device": ranks.device,
            "before_batch": before_batch,
        }
        if (rows := data.held_out or data.test) is not None:
            held_out = score_held_out(engine, rows.examples, size, collate=collate_pairs, **how)
        if data.test is not None and final:
            written = translate(engine, data.sources(), self._decoding(data.tokenizer), size, **how)
            texts = data.tokenizer.batch_decode(written, skip_special_tokens=True)
            lines = tuple(map(one_line, texts))
            test = score_translations(list(lines), data.references())
        return PairScore(held_out, test, lines, selects=data.held_out is not None) if held_out else None

    def _decoding(self, tokenizer: PreTrainedTokenizerBase) -> Decoding:
        how = self.recipe.translation
        return Decoding(
            how.beams, self.recipe.evaluation.max_new_tokens, how.length_penalty, eos=tokenizer.eos_token_id
        )

    def rehearse_scoring(self, engine: Engine, data: PairData, ranks: Ranks) -> None:
        """The largest held-out batch; and of the longest sources' translations the first tokens, with room for all."""
        size = self.recipe.evaluation.micro_batch_size
        if (rows := data.held_out or data.test) is not None:
            rehearse_evaluation(engine, self.worst_batch(rows.examples, size), ranks.device)
        if data.test is not None:
            longest = sorted(data.sources(), key=len, reverse=True)[:size]
            engine.train_mode(False)
            write_batch(engine, longest, self._decoding(data.tokenizer), ranks.device, stop_after=2)

    def highest_sound_loss(self, config: PreTrainedConfig) -> float:
        """Four times a uniform guess's, nats a token."""
        return 4 * math.log(config.vocab_size)
