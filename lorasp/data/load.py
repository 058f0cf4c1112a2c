"""The recipe's data, read, checked and tokenized: what a run trains and what it holds out."""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from lorasp.data.examples import EncodedExamples, Example, encode, first_response, prompt_ids
from lorasp.data.order import SampleOrder
from lorasp.data.rows import Rows, content, read_rows
from lorasp.data.sources import hub_snapshot, is_on_hub
from lorasp.hashing import stream_key
from lorasp.recipe import Data, Recipe, RecipeError, Source


@dataclass(frozen=True)
class Part:
    """The examples of one source."""

    rows: Rows
    encoded: EncodedExamples
    weight: float = 1.0  # how many times an epoch visits each


@dataclass(frozen=True)
class DataSet:
    """The examples of one or several sources, one source behind the other."""

    parts: tuple[Part, ...]

    @cached_property
    def examples(self) -> list[Example]:
        return [example for part in self.parts for example in part.encoded.examples]

    @property
    def token_count(self) -> int:
        return sum(len(example.input_ids) for example in self.examples)


@dataclass(frozen=True)
class RunData:
    """Training and held-out examples, and the rows that they were made of."""

    train: DataSet
    held_out: DataSet | None
    tokenizer: PreTrainedTokenizerBase | None  # None: random tokens
    template: str

    def order(self, recipe: Recipe) -> SampleOrder:
        """The order in which the run visits the training examples."""
        return SampleOrder(
            [len(example.input_ids) for example in self.train.examples],
            seed=recipe.seed,
            epochs=recipe.training.epochs,
            global_batch_size=recipe.training.global_batch_size,
            max_steps=recipe.training.max_steps,
            sources=[(len(part.encoded.examples), part.weight) for part in self.train.parts],
            pack_to=recipe.data.max_length if recipe.data.packing else None,
            group_by_length=recipe.data.group_by_length,
        )

    def describe(self) -> list[str]:
        """A line a source: rows, and what was left out or cut."""
        lines = []
        for kind, data in self._sets():
            for part in data.parts:
                line = f"{kind.replace('_', ' ')}: {len(part.encoded.examples):,} rows of {part.rows.source}"
                line += f" ({part.rows.layout})"
                if part.weight != 1:
                    line += f", {part.weight:g} times an epoch"
                for count, fate in (
                    (part.rows.dropped_empty, "with an empty output dropped"),
                    (part.encoded.spelled, "dropped as a message spells a special token of the tokenizer"),
                    (part.encoded.dropped, "dropped as too long (data.max_length)"),
                    (part.encoded.truncated, "with their response cut (data.max_length)"),
                    (part.encoded.straddling, "with a token across the edge of a response, which is not trained"),
                ):
                    if count:
                        line += f"; {count:,} {fate}"
                lines.append(line)
        return lines

    def report(self) -> dict[str, Any]:
        """The data section of report.json: an entry a data set, and one a source where there are several."""
        section: dict[str, Any] = {}
        for kind, data in self._sets():
            if len(data.parts) == 1:
                section[kind] = _report(data.parts[0])
                continue
            section[kind] = {
                "source": f"{len(data.parts)} sources",
                "digest": hashlib.sha256("".join(part.rows.digest for part in data.parts).encode()).hexdigest(),
                "rows": len(data.examples),
                "tokens": data.token_count,
            }
            for number, part in enumerate(data.parts, start=1):
                section[f"{kind}_{number}"] = _report(part) | {"weight": part.weight}
        return section

    def samples(self, count: int) -> list[dict[str, str]]:
        """`prompt` and `expected` of the first held-out examples, to be answered before and after training; of a chat
        also its `layout`, by which `prompt_ids` takes special tokens in the prompt for what they are.

        Not of a prompt without a token (an empty one, where the tokenizer puts no BOS before it): nothing follows it.
        """
        if self.held_out is None:
            return []
        samples = []
        for rows, row in ((part.rows, row) for part in self.held_out.parts for row in part.encoded.rows):
            if len(samples) == count:
                break
            prompt, expected = first_response(self.tokenizer, rows, self.template, row)
            if prompt_ids(self.tokenizer, prompt, rows.layout):
                its_layout = {"layout": "chat"} if rows.layout == "chat" else {}
                samples.append({"prompt": prompt, "expected": expected, **its_layout})
        return samples

    def _sets(self) -> Iterator[tuple[str, DataSet]]:
        yield "train", self.train
        if self.held_out is not None:
            yield "held_out", self.held_out


def download_data(data: Data) -> None:
    """Puts the hub data sets that `data` names into the hub's cache. Raises RecipeError."""
    for source in () if data.is_random else (*data.train_sources, data.held_out_source):
        if source is not None and is_on_hub(source):
            hub_snapshot(source, download=True)


def read_train_and_held_out(recipe: Recipe, read: Callable[[Source], Rows]) -> tuple[list[Rows], list[Rows]]:
    """The rows of each source of `data.train`, and what is held out: its own source's, a share of those, or none."""
    data = recipe.data
    train = [read(source) for source in data.train_sources]
    if isinstance(data.held_out, float):
        return split_rows(train, data.held_out, recipe.seed)
    return train, [] if data.held_out_source is None else [read(data.held_out_source)]


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase) -> RunData:
    """The data, checked and tokenized; that of the hub from its cache (`download_data`). Raises RecipeError."""
    data = recipe.data

    def read(source: Source) -> Rows:
        return read_rows(source, layout=data.format, empty_output=data.empty_output)

    def encoded(rows: Rows, weight: float = 1.0) -> Part:
        return Part(rows, encode(tokenizer, rows, data.template, data.max_length, data.too_long), weight)

    train, held_out = read_train_and_held_out(recipe, read)
    weights = [source.weight for source in data.train_sources]
    return RunData(
        train=DataSet(tuple(encoded(rows, weight) for rows, weight in zip(train, weights, strict=True))),
        held_out=DataSet(tuple(encoded(rows) for rows in held_out)) if held_out else None,
        tokenizer=tokenizer,
        template=data.template,
    )


def split_rows(sources: list[Rows], share: float, seed: int) -> tuple[list[Rows], list[Rows]]:
    """The rows to train on, of each source, and `share` of all rows to hold out, of the sources that give any.

    Which ones follows from the seed and a row's texts: rows of equal texts, in whatever source, are on the same side.
    Raises RecipeError if either side, or a source's part of the training rows, would be empty.
    """
    keys = [[stream_key(seed, "held out", content(row)) for row in rows.rows] for rows in sources]
    every = sorted(key for its_keys in keys for key in its_keys)
    wanted = round(len(every) * share)
    if wanted == 0:
        raise RecipeError(f"data.held_out: {share:g} of {len(every)} rows is none; give a larger share, or a file")
    last = every[wanted - 1]
    train, held_out = [], []
    for rows, its_keys in zip(sources, keys, strict=True):
        kept = [index for index, key in enumerate(its_keys) if key > last]
        if not kept:
            raise RecipeError(
                f"data.held_out: {share:g} of the rows is all of {rows.source} ({len(its_keys)} rows, equal ones "
                f"counted together); give a smaller share, or a file"
            )
        train.append(rows.only(kept))
        chosen = [index for index, key in enumerate(its_keys) if key <= last]
        if chosen:
            held_out.append(rows.only(chosen))
    return train, held_out


def _report(part: Part) -> dict[str, Any]:
    commit = {} if part.rows.commit is None else {"commit": part.rows.commit}
    return {
        "source": part.rows.source,
        **commit,
        "digest": part.rows.digest,
        "layout": part.rows.layout,
        "rows": len(part.encoded.examples),
        "tokens": sum(len(example.input_ids) for example in part.encoded.examples),
        "dropped_empty": part.rows.dropped_empty,
        "dropped_special_tokens": part.encoded.spelled,
        "dropped_too_long": part.encoded.dropped,
        "truncated": part.encoded.truncated,
        "straddling": part.encoded.straddling,
    }
